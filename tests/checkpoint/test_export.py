"""Parameters alone in a file, with their configuration."""

import os

import pytest
import safetensors.numpy as safetensors_numpy

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.run import trainer

import helpers
from helpers import assert_same

CONFIG = helpers.RUN


def test_round_trip(tmp_path):
  params = helpers.random_params(CONFIG)
  tvq.export_params(tmp_path / "a" / "model.safetensors", CONFIG, params)
  config, again = tvq.import_params(tmp_path / "a" / "model.safetensors")
  assert config == CONFIG
  assert_same(again, params)
  assert os.listdir(tmp_path / "a") == ["model.safetensors"]


@pytest.mark.parametrize("content", [b"", b"\x08" + b"\0" * 7 + b"{}      ", b"x" * 100])
def test_other_files(tmp_path, content):
  (tmp_path / "file").write_bytes(content)
  with pytest.raises(ValueError, match="file does not hold the parameters of a model"):
    tvq.import_params(tmp_path / "file")


def test_truncated(tmp_path):
  file = tmp_path / "file"
  tvq.export_params(file, CONFIG, helpers.random_params(CONFIG))
  file.write_bytes(file.read_bytes()[:-5])
  with pytest.raises(ValueError, match="does not hold"):
    tvq.import_params(file)


def test_of_another_configuration(tmp_path):
  with pytest.raises(ValueError, match="params do not fit this config"):
    tvq.export_params(tmp_path / "file", CONFIG.replace(n_code=7), helpers.random_params(CONFIG))
  assert not (tmp_path / "file").exists()


def test_parameters_that_are_not_of_the_configuration_beside_them(tmp_path):
  file = tmp_path / "file"
  tvq.export_params(file, CONFIG, helpers.random_params(CONFIG))
  settings = {"format": "tvq_haiku", "config": CONFIG.replace(n_code=7).to_json()}
  safetensors_numpy.save_file(safetensors_numpy.load_file(file), file, settings)
  with pytest.raises(ValueError, match=r"does not hold .*: params do not fit this config"):
    tvq.import_params(file)


def test_a_run_begins_with_them(tmp_path):
  params = helpers.random_params(CONFIG)
  begin = trainer.resume_or_initialize(CONFIG, helpers.RUN_TRAINING, tmp_path, params=params)
  assert_same(begin.train_state.params, params)
  assert run_directory.latest_step(tmp_path) is None
