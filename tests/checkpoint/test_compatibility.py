"""Files written before the modules moved into folders can still be read: see compat/README.md."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.evaluation import compression
from tvq_haiku.run import trainer

import helpers
from helpers import assert_same

pytestmark = pytest.mark.slow

COMPAT = pathlib.Path(__file__).parent / "compat"
CONFIG = helpers.RUN.replace(head_type="shga", n_head=1, d_model=8, d_k=4, d_v=8)


@pytest.fixture(scope="module")
def expected():
  with np.load(COMPAT / "expected.npz") as arrays:
    return dict(arrays)


@pytest.fixture
def run(tmp_path):
  """A copy of the saved run, which a test may change."""
  return shutil.copytree(COMPAT / "run", tmp_path / "run")


def last_logits(params, tokens):
  return helpers.apply(params, CONFIG, tokens).logits[:, -4:]


def param_names(params):
  return sorted(f"{module}/{name}" for module, leaves in params.items() for name in leaves)


def test_checkpoint_loads_with_the_same_logits(run, expected, capsys):
  checkpoint = tvq.load_checkpoint(run)
  assert capsys.readouterr().err == ""  # no warning: the files match their manifest
  assert (checkpoint.config, checkpoint.train_cfg) == (CONFIG, helpers.RUN_TRAINING)
  assert (int(checkpoint.train_state.step), checkpoint.data_step) == (6, 3)
  params = checkpoint.train_state.params
  np.testing.assert_allclose(
    last_logits(params, expected["tokens"]), expected["logits"], atol=1e-6, rtol=1e-6
  )


def test_export_loads_with_the_same_parameters(run, expected):
  params, config = tvq.import_params(COMPAT / "params.safetensors")
  assert config == CONFIG
  assert_same(params, tvq.load_checkpoint(run).train_state.params)
  np.testing.assert_allclose(
    last_logits(params, expected["tokens"]), expected["logits"], atol=1e-6, rtol=1e-6
  )


def test_parameter_names_are_unchanged(expected):
  params = tvq.params_shapes(CONFIG)
  assert param_names(params) == expected["param_names"].tolist()
  assert param_names(tvq.import_params(COMPAT / "params.safetensors")[0]) == param_names(params)


def test_fingerprint_of_compressed_files_is_unchanged():
  """Fields that were added to the configuration later must not change it."""
  params, config = tvq.import_params(COMPAT / "params.safetensors")
  fingerprint = compression._fingerprint(params, config, data.ByteVocabulary)
  assert fingerprint.hex() == "cd7860be4191efcb"
  changed = config.replace(full_len=3)
  assert compression._fingerprint(params, changed, data.ByteVocabulary) != fingerprint


def test_export_writes_the_same_arrays_and_format(tmp_path):
  params, config = tvq.import_params(COMPAT / "params.safetensors")
  tvq.export_params(params, config, tmp_path / "params.safetensors")
  before, after = (read_safetensors(d / "params.safetensors") for d in (COMPAT, tmp_path))
  assert after[0].keys() == before[0].keys()
  assert_same(after[0], before[0])
  assert after[1].keys() == before[1].keys()
  assert after[1]["format"] == before[1]["format"]
  # A later version may add fields to the configuration.
  assert json.loads(before[1]["config"]).items() <= json.loads(after[1]["config"]).items()


def read_safetensors(file):
  """Returns the arrays and the metadata of a safetensors file."""
  with safetensors.safe_open(file, "np") as content:
    return {name: content.get_tensor(name) for name in content.keys()}, content.metadata()


def test_run_resumes(run, expected):
  end = trainer.fit(CONFIG, helpers.RUN_TRAINING, helpers.run_batches(), run)
  assert int(end.train_state.step) == helpers.RUN_TRAINING.n_max_step
  assert jax.tree.structure(end.train_state) == jax.tree.structure(
    tvq.load_checkpoint(run, 6).train_state
  )
  np.testing.assert_allclose(
    last_logits(end.train_state.params, expected["tokens"]),
    expected["resumed_logits"],
    atol=1e-4,
    rtol=1e-4,
  )
