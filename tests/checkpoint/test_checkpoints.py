"""Loading checkpoints: round trips, missing files and damaged files."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory

from damage import KINDS, damage
import helpers
from helpers import assert_same
import privileges

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING
# Orbax leaves unfinished coroutines when it fails.
ignore_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A directory with checkpoints of steps 10 and 12, and the checkpoints."""
  directory = tmp_path_factory.mktemp("run")
  checkpoints = [helpers.make_checkpoint(step) for step in (10, 12)]
  for checkpoint in checkpoints:
    tvq.save_checkpoint(directory, checkpoint)
  return directory, checkpoints


@pytest.fixture
def run(saved, tmp_path):
  """A copy of the saved directory, which a test may change."""
  return shutil.copytree(saved[0], tmp_path / "run")


def test_round_trip(saved):
  directory, (earlier, later) = saved
  for step, expected in ((None, later), (12, later), (10, earlier)):
    loaded = tvq.load_checkpoint(directory, step)
    assert (loaded.config, loaded.train_cfg) == (CONFIG, TRAIN)
    assert loaded.data_step == expected.data_step
    assert_same(loaded.train_state, expected.train_state)
    assert jax.tree.structure(loaded.train_state) == jax.tree.structure(expected.train_state)
    assert_same(jax.random.key_data(loaded.rng), jax.random.key_data(expected.rng))


@pytest.mark.parametrize(
  "saved_impl, is_recorded, default_impl",
  [
    ("threefry2x32", True, "rbg"),
    ("threefry2x32", False, "rbg"),
    ("rbg", True, "threefry2x32"),
    ("rbg", False, "threefry2x32"),
    ("unsafe_rbg", True, "rbg"),
  ],
)
def test_random_keys_may_be_of_another_kind_than_the_default(
  tmp_path, saved_impl, is_recorded, default_impl
):
  """Earlier versions did not record the kind."""
  rng = jax.random.key(5, impl=saved_impl)
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(10)._replace(rng=rng))
  if not is_recorded:
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("rng_impl") == saved_impl
    (tmp_path / "config.json").write_text(json.dumps(config))
  with jax.default_prng_impl(default_impl):
    loaded = tvq.load_checkpoint(tmp_path)
  assert jax.random.key_impl(loaded.rng) == saved_impl
  assert_same(jax.random.key_data(loaded.rng), jax.random.key_data(rng))


def test_unknown_kind_of_random_keys_is_named(run):
  config = run / "config.json"
  config.write_text(config.read_text().replace('"threefry2x32"', '"fourfish"'))
  with pytest.raises(tvq.CheckpointError, match=r"checkpoints/12 is damaged .*fourfish"):
    tvq.load_checkpoint(run, step=12)


def test_bfloat16_momentum_round_trip(tmp_path):
  train_cfg = TRAIN.replace(optimizer="lion")
  state = tvq.init_train_state(CONFIG, train_cfg, jax.random.key(0))
  tvq.save_checkpoint(tmp_path, tvq.Checkpoint(CONFIG, train_cfg, state, jax.random.key(1), 7))
  loaded = tvq.load_checkpoint(tmp_path)
  assert_same(loaded.train_state, state)
  dtypes = [x.dtype for x in jax.tree.leaves(loaded.train_state)]
  assert dtypes == [x.dtype for x in jax.tree.leaves(state)] and jax.numpy.bfloat16 in dtypes
  assert loaded.data_step == 7


def test_missing_directory_is_named_and_not_created(tmp_path):
  with pytest.raises(tvq.CheckpointError, match="nowhere holds no checkpoint: it does not exist"):
    tvq.load_checkpoint(tmp_path / "nowhere")
  assert not (tmp_path / "nowhere").exists()


def test_missing_steps_are_named(run):
  with pytest.raises(
    tvq.CheckpointError, match="no checkpoint of update 2; it holds those of updates 10, 12"
  ):
    tvq.load_checkpoint(run, step=2)
  shutil.rmtree(run / "checkpoints")
  with pytest.raises(tvq.CheckpointError, match="holds no checkpoint: checkpoints/ is empty"):
    tvq.load_checkpoint(run)


@pytest.mark.parametrize("kind", ["truncated", "one bit flipped", "missing", "empty"])
def test_damaged_file_is_named(run, kind):
  file = damage(run / "checkpoints" / "12", kind)
  problem = f"{re.escape(file.name)} {'is missing' if kind == 'missing' else 'has changed'}"
  with pytest.raises(
    tvq.CheckpointError, match=rf"checkpoints/12 is damaged or incomplete: .*{problem}\."
  ):
    tvq.load_checkpoint(run, step=12)


@ignore_coroutines
@pytest.mark.parametrize("kind", KINDS)
def test_newest_intact_checkpoint_is_loaded(saved, run, capsys, kind):
  damage(run / "checkpoints" / "12", kind)
  with privileges.dropped():
    loaded = tvq.load_checkpoint(run)
  assert_same(loaded.train_state, saved[1][0].train_state)
  log = capsys.readouterr().err
  assert f"warning: {run}/checkpoints/12 is damaged or incomplete: " in log
  assert "Loading the checkpoint of update 10 instead." in log
  assert run_directory.saved_steps(run) == [10, 12]  # loading changes no files


def test_incomplete_checkpoint_is_not_loaded(run, capsys):
  steps = run / "checkpoints"
  (steps / "12").rename(steps / "12.orbax-checkpoint-tmp-7")
  assert int(tvq.load_checkpoint(run).train_state.step) == 10
  assert capsys.readouterr().err == ""


def test_missing_manifest_is_a_warning_only(saved, run, capsys):
  """A process may end after it wrote a checkpoint and before it wrote the manifest."""
  (run / "checkpoints" / "12" / "manifest.json").unlink()
  assert_same(tvq.load_checkpoint(run).train_state, saved[1][1].train_state)
  assert "checkpoints/12 has no manifest.json; loading it without verification" in (
    capsys.readouterr().err
  )


def test_error_if_the_only_checkpoint_is_damaged(run):
  damage(run / "checkpoints" / "12", "empty")
  shutil.rmtree(run / "checkpoints" / "10")
  with pytest.raises(tvq.CheckpointError, match=r"12 is damaged .* has changed\.$"):
    tvq.load_checkpoint(run)


def test_error_points_to_the_best_checkpoint_if_all_others_are_damaged(saved, run):
  for step in ("10", "12"):
    damage(run / "checkpoints" / step, "empty")
  message = r"checkpoints/12 is damaged .* No older checkpoint can be loaded either\."
  with pytest.raises(tvq.CheckpointError, match=message + "$"):
    tvq.load_checkpoint(run)
  shutil.copytree(saved[0], run / "best")
  with pytest.raises(tvq.CheckpointError, match=message + " .*/best may still be intact: export"):
    tvq.load_checkpoint(run)


def test_checkpoints_replaced_while_loading(saved, run, monkeypatch):
  """A run in progress removes the checkpoints that were listed, and saves another one."""
  listed = iter([[2, 4], [10, 12]])
  monkeypatch.setattr(run_directory, "saved_steps", lambda directory: next(listed))
  assert_same(tvq.load_checkpoint(run).train_state, saved[1][1].train_state)


def test_arrays_are_placed_on_the_mesh(saved):
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  state = tvq.load_checkpoint(saved[0], mesh=mesh).train_state
  assert_same(state, saved[1][1].train_state)
  for x in jax.tree.leaves(state):
    assert x.sharding.device_set == set(mesh.devices.flat)
  state = tvq.load_checkpoint(saved[0]).train_state
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(state))
  assert np.ndim(state.step) == 0
