"""Damaged checkpoints, full disks, processes that die."""

import os
import shutil

import jax
import jax.numpy as jnp
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.parallel import sharding
from tvq_haiku.run import best_checkpoint, trainer
from tvq_haiku.training import train_step as train_step_lib

from damage import damage
import helpers
from helpers import assert_same
import privileges

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Two checkpoints of a run, of steps 8 and 12."""
  workdir = tmp_path_factory.mktemp("run")
  return workdir, trainer.fit(
    CONFIG, TRAIN, helpers.run_batches(), workdir, options=trainer.TrainerOptions(save_seconds=0.0)
  )


class TestDamage:
  # Orbax leaves coroutines behind when it fails.
  @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
  @pytest.mark.parametrize("kind", ["one bit flipped", "directory without permission"])
  def test_run_resumes_from_the_newest_intact_checkpoint(self, saved, tmp_path, capsys, kind):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    assert run_directory.saved_steps(workdir) == [10, 12]
    damage(workdir / "checkpoints" / "12", kind)
    with privileges.dropped():
      end = trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    assert f"warning: {workdir}/checkpoints/12 is damaged" in capsys.readouterr().err
    assert_same(end.train_state, saved[1].train_state)
    assert_same(tvq.load_checkpoint(workdir).train_state, saved[1].train_state)
    assert [p.name for p in (workdir / "damaged").iterdir()] == ["12"]

  def test_run_resumes_before_an_incomplete_checkpoint(self, saved, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    steps = workdir / "checkpoints"
    (steps / "12").rename(steps / "12.orbax-checkpoint-tmp-7")
    end = trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    assert_same(end.train_state, saved[1].train_state)

  def test_run_does_not_start_anew_if_all_checkpoints_are_damaged(self, saved, tmp_path):
    workdir = shutil.copytree(saved[0], tmp_path / "run")
    for step in ("10", "12"):
      damage(workdir / "checkpoints" / step, "empty")
    with pytest.raises(tvq.CheckpointError, match="No older checkpoint"):
      trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    assert run_directory.saved_steps(workdir) == [10, 12]

  def test_best_is_what_is_noted_even_if_a_later_one_is_there(self, tmp_path):
    """The process died before it noted its best, and went on from an older checkpoint."""
    state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0))
    for step, loss in ((8, 2.0), (4, 1.0)):
      now = tvq.Checkpoint(
        CONFIG, TRAIN, state._replace(step=jnp.int32(step)), jax.random.key(1), 1
      )
      assert best_checkpoint.keep_best(tmp_path, now, loss)
      assert run_directory.saved_steps(tmp_path / "best") == [step]

  def test_how_it_is_computed_may_change(self, saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    changed = CONFIG.replace(remat="layer", reduction="scan"), TRAIN.replace(n_accumulate=2)
    end = trainer.fit(*changed, helpers.run_batches(), tmp_path / "run")
    assert_same(end.train_state, saved[1].train_state)


class TestOtherMeshes:
  def test_a_run_goes_on_with_another_number_of_devices(self, tmp_path):
    config = CONFIG.replace(p_dropres=0.0, p_droplyr=0.0)
    whole = trainer.fit(config, TRAIN, helpers.run_batches(), tmp_path / "whole")
    for mesh, stop_at in (("fsdp:2,model:2", 2), (None, 6)):
      mesh = sharding.make_mesh(mesh) if mesh else None
      monkey = train_step_lib.make_train_step

      def limited(config, train_cfg, mesh, stop_at=stop_at):
        step = monkey(config, train_cfg, mesh)
        seen = []

        def count(state, batch, rng):
          seen.append(1)
          if int(state.step) // 2 + 1 == stop_at and stop_at < 6:
            os.kill(os.getpid(), 15)
          return step(state, batch, rng)

        count.n_compiled = step.n_compiled
        return count

      train_step_lib.make_train_step = limited
      try:
        end = trainer.fit(config, TRAIN, helpers.run_batches(), tmp_path / "run", mesh=mesh)
      finally:
        train_step_lib.make_train_step = monkey
      assert int(end.train_state.step) == 2 * stop_at
    again = tvq.load_checkpoint(tmp_path / "run", mesh=sharding.make_mesh("fsdp:4")).train_state
    assert again.params["transformer/unembedding"]["kernel"].sharding.spec[0] == "fsdp"
    assert_same(again, end.train_state)
    helpers.assert_trees_close(end.train_state.params, whole.train_state.params, atol=5e-5)
