"""Exported parameters: one file with parameters and configuration."""

import os

import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.run import trainer

import helpers
from helpers import assert_same

CONFIG = helpers.RUN


@pytest.mark.parametrize("pe_abs", [False, True])  # True: one parameter is a scalar
def test_round_trip(pe_abs, tmp_path):
  want = CONFIG.replace(pe_abs=pe_abs)
  params = helpers.random_params(want)
  tvq.export_params(params, want, tmp_path / "a" / "model.safetensors")
  loaded, config = tvq.import_params(tmp_path / "a" / "model.safetensors")
  assert config == want
  assert_same(loaded, params)
  assert os.listdir(tmp_path / "a") == ["model.safetensors"]


def test_existing_file_is_replaced(tmp_path):
  for seed in (0, 1):
    params = helpers.random_params(CONFIG, seed)
    tvq.export_params(params, CONFIG, tmp_path / "file")
    assert_same(tvq.import_params(tmp_path / "file")[0], params)


@pytest.mark.parametrize("content", [b"", b"\x08" + b"\0" * 7 + b"{}      ", b"x" * 100])
def test_other_files_are_refused(tmp_path, content):
  (tmp_path / "file").write_bytes(content)
  with pytest.raises(ValueError, match="file does not hold the parameters of a model"):
    tvq.import_params(tmp_path / "file")


def test_safetensors_of_other_programs_are_refused(tmp_path):
  safetensors_numpy.save_file({"a": np.zeros(3)}, tmp_path / "file", {"format": "pt"})
  with pytest.raises(ValueError, match=r"model \(its format is 'pt', expected 'tvq_haiku'\)"):
    tvq.import_params(tmp_path / "file")


def test_truncated_file_is_refused(tmp_path):
  file = tmp_path / "file"
  tvq.export_params(helpers.random_params(CONFIG), CONFIG, file)
  file.write_bytes(file.read_bytes()[:-5])
  with pytest.raises(ValueError, match="does not hold the parameters of a model"):
    tvq.import_params(file)


def test_missing_file_is_an_os_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    tvq.import_params(tmp_path / "nowhere")


def test_params_of_a_different_config_are_not_exported(tmp_path):
  with pytest.raises(ValueError, match="params do not fit this config"):
    tvq.export_params(helpers.random_params(CONFIG), CONFIG.replace(n_code=7), tmp_path / "file")
  assert not (tmp_path / "file").exists()


def test_params_that_do_not_fit_their_config_are_not_imported(tmp_path):
  file = tmp_path / "file"
  tvq.export_params(helpers.random_params(CONFIG), CONFIG, file)
  settings = {"format": "tvq_haiku", "config": CONFIG.replace(n_code=7).to_json()}
  safetensors_numpy.save_file(safetensors_numpy.load_file(file), file, settings)
  with pytest.raises(ValueError, match=r"does not hold .*\(params do not fit this config"):
    tvq.import_params(file)


def test_run_is_initialized_from_exported_params(tmp_path):
  params = helpers.random_params(CONFIG)
  tvq.export_params(params, CONFIG, tmp_path / "file")
  begin = trainer.resume_or_initialize(
    CONFIG,
    helpers.RUN_TRAINING,
    tmp_path / "run",
    params=tvq.import_params(tmp_path / "file")[0],
  )
  assert_same(begin.train_state.params, params)
  assert int(begin.train_state.step) == 0
  assert run_directory.latest_step(tmp_path / "run") is None
