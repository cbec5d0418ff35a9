"""Writing checkpoints in the background."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.checkpoint.checkpoint_writer import CheckpointWriter

import helpers
from helpers import assert_same

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING


def test_files_on_disk(tmp_path):
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(4))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "config.json"]
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
  content = {p.name for p in (tmp_path / "checkpoints" / "4").iterdir()}
  assert {"manifest.json", "default"} <= content
  settings = json.loads((tmp_path / "config.json").read_text())
  assert settings.keys() == {"format", "model", "train", "rng_impl"} and settings["format"] == 1
  assert settings["model"]["n_code"] == 6 and settings["train"]["n_max_step"] == 12


def test_only_the_most_recent_checkpoints_are_kept(tmp_path):
  for step in (2, 4, 6):
    tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(step))
  assert run_directory.saved_steps(tmp_path) == [4, 6]
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(8), max_to_keep=1)
  assert run_directory.saved_steps(tmp_path) == [8]


@pytest.mark.parametrize("step", [2, 4])
def test_steps_must_increase(tmp_path, step):
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(4))
  with pytest.raises(
    tvq.CheckpointError,
    match=f"holds a checkpoint of update 4; one of update {step} would",
  ):
    tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(step))


def test_directory_of_a_different_run_is_refused(tmp_path):
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint())
  config = (tmp_path / "config.json").read_text()
  with pytest.raises(tvq.CheckpointError, match="different configuration: n_code is 6 in the run"):
    CheckpointWriter(tmp_path, CONFIG.replace(n_code=7), TRAIN)
  assert (tmp_path / "config.json").read_text() == config


def test_params_that_do_not_fit_their_config_are_refused(tmp_path):
  checkpoint = helpers.make_checkpoint()._replace(config=CONFIG.replace(n_code=7))
  with pytest.raises(ValueError, match=r"params do not fit this config: .*/quantizer/c_count"):
    tvq.save_checkpoint(tmp_path / "run", checkpoint)
  assert not (tmp_path / "run").exists()


def test_config_without_checkpoints_is_replaced(tmp_path):
  """A process may end before its first checkpoint, and be restarted with another configuration."""
  with CheckpointWriter(tmp_path, CONFIG.replace(n_code=7), TRAIN):
    pass
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint())
  assert run_directory.load_config(tmp_path) == (CONFIG, TRAIN)


def test_directory_that_cannot_be_created_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"cannot write to the directory .*file/run: Not a directory"):
    CheckpointWriter(tmp_path / "file" / "run", CONFIG, TRAIN)


def test_checkpoints_directory_that_cannot_be_created_is_named(tmp_path):
  (tmp_path / "checkpoints").symlink_to(tmp_path / "missing")
  with pytest.raises(OSError, match=r"cannot write checkpoints to .*/checkpoints: .*File exists"):
    CheckpointWriter(tmp_path, CONFIG, TRAIN)


def test_full_disk_is_named(tmp_path, monkeypatch):
  writer = CheckpointWriter(tmp_path, CONFIG, TRAIN)

  def raise_disk_full():
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

  with pytest.raises(
    OSError, match=r"cannot write the checkpoint of update 0 to .*: no space left on the device"
  ):
    with writer:
      monkeypatch.setattr(writer._manager, "wait_until_finished", raise_disk_full)
      writer.save(helpers.make_checkpoint())


def test_manifest_is_written_before_the_next_call(tmp_path):
  with CheckpointWriter(tmp_path, CONFIG, TRAIN) as writer:
    writer.save(helpers.make_checkpoint())
    deadline = time.monotonic() + 30
    while not (tmp_path / "checkpoints" / "0" / "manifest.json").exists():
      assert time.monotonic() < deadline
      time.sleep(0.01)


def test_buffers_may_be_reused_while_they_are_written(tmp_path):
  config = CONFIG.replace(n_vocab=50_000)
  state = tvq.init_train_state(config, TRAIN, jax.random.key(0))
  expected = jax.device_get(jax.tree.map(jnp.copy, state))
  overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
  with CheckpointWriter(tmp_path, config, TRAIN) as writer:
    writer.save(tvq.Checkpoint(config, TRAIN, state, jax.random.key(1), 0))
    jax.block_until_ready(overwrite(state))
  assert_same(tvq.load_checkpoint(tmp_path).train_state, expected)


def test_missing_orbax_is_named(tmp_path, monkeypatch):
  checkpoint = helpers.make_checkpoint()

  def raise_not_found(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr("importlib.import_module", raise_not_found)
  with pytest.raises(
    ImportError, match=r"orbax is required for checkpoints.*pip install 'tvq_haiku\[train\]'"
  ):
    tvq.save_checkpoint(tmp_path, checkpoint)


def test_checkpoints_without_their_config_are_not_overwritten(tmp_path):
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint())
  shutil.move(tmp_path / "config.json", tmp_path / "other.json")
  with pytest.raises(tvq.CheckpointError, match=r"holds checkpoints but no config\.json"):
    tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(2))
  assert run_directory.saved_steps(tmp_path) == [0]
