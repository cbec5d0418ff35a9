"""Runs that resume from damaged checkpoints, with other settings, and on other devices."""

import os
import shutil
import signal

import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.parallel import sharding
from tvq_haiku.run import trainer
from tvq_haiku.training import train_step as train_step_lib

from damage import damage
import helpers
from helpers import assert_same
import privileges

pytestmark = pytest.mark.slow

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """The directory of a run with checkpoints of steps 10 and 12, and its last checkpoint."""
  workdir = tmp_path_factory.mktemp("run")
  return workdir, trainer.fit(
    CONFIG, TRAIN, helpers.run_batches(), workdir, options=trainer.TrainerOptions(save_seconds=0.0)
  )


@pytest.fixture
def workdir(uninterrupted, tmp_path):
  """A copy of the directory of the uninterrupted run."""
  workdir = shutil.copytree(uninterrupted[0], tmp_path / "run")
  assert run_directory.saved_steps(workdir) == [10, 12]
  return workdir


class TestDamage:
  # Orbax leaves unfinished coroutines when it fails.
  @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
  @pytest.mark.parametrize("kind", ["one bit flipped", "directory without permission"])
  def test_run_resumes_from_the_newest_intact_checkpoint(
    self, uninterrupted, workdir, capsys, kind
  ):
    damage(workdir / "checkpoints" / "12", kind)
    with privileges.dropped():
      end = trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    err = capsys.readouterr().err
    assert f"warning: {workdir}/checkpoints/12 is damaged" in err
    assert "resuming after 10 of 12 updates" in err
    assert_same(end.train_state, uninterrupted[1].train_state)
    assert_same(tvq.load_checkpoint(workdir).train_state, uninterrupted[1].train_state)
    assert [p.name for p in (workdir / "damaged").iterdir()] == ["12"]

  def test_run_resumes_from_the_checkpoint_before_an_incomplete_one(
    self, uninterrupted, workdir, capsys
  ):
    steps = workdir / "checkpoints"
    (steps / "12").rename(steps / "12.orbax-checkpoint-tmp-7")
    end = trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    assert "resuming after 10 of 12 updates" in capsys.readouterr().err
    assert_same(end.train_state, uninterrupted[1].train_state)

  def test_run_does_not_start_anew_if_all_checkpoints_are_damaged(self, workdir):
    for step in ("10", "12"):
      damage(workdir / "checkpoints" / step, "empty")
    with pytest.raises(tvq.CheckpointError, match="No older checkpoint"):
      trainer.fit(CONFIG, TRAIN, helpers.run_batches(), workdir)
    assert run_directory.saved_steps(workdir) == [10, 12]


class TestOtherResources:
  @pytest.mark.parametrize("n_accumulate", [1, 2])
  def test_settings_of_memory_and_speed_may_change_when_a_run_resumes(
    self, uninterrupted, workdir, n_accumulate
  ):
    shutil.rmtree(workdir / "checkpoints" / "12")
    config = CONFIG.replace(remat="layer", reduction="scan")
    train_cfg = TRAIN.replace(n_accumulate=n_accumulate)
    end = trainer.fit(config, train_cfg, helpers.run_batches(), workdir)
    assert int(end.train_state.step) == 12
    if n_accumulate == 1:  # with more, each part of a batch has its own dropout
      helpers.assert_trees_close(
        end.train_state.params, uninterrupted[1].train_state.params, atol=5e-5
      )

  def test_run_resumes_on_another_number_of_devices(self, tmp_path, monkeypatch):
    config = CONFIG.replace(p_dropres=0.0, p_droplyr=0.0)
    single_device = trainer.fit(config, TRAIN, helpers.run_batches(), tmp_path / "single")
    make_train_step = train_step_lib.make_train_step

    def make(config, train_cfg, mesh):
      step = make_train_step(config, train_cfg, mesh)

      def stopping_step(state, batch, rng):
        if int(state.step) == 2:
          os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch, rng)

      stopping_step.n_compiled = step.n_compiled
      return stopping_step

    monkeypatch.setattr(train_step_lib, "make_train_step", make)
    for mesh, step in ((sharding.make_mesh("fsdp:2,model:2"), 4), (None, 12)):
      end = trainer.fit(config, TRAIN, helpers.run_batches(), tmp_path / "run", mesh=mesh)
      assert int(end.train_state.step) == step
    mesh = sharding.make_mesh("fsdp:4")
    loaded = tvq.load_checkpoint(tmp_path / "run", mesh=mesh).train_state
    assert loaded.params["transformer/unembedding"]["kernel"].sharding.spec[0] == "fsdp"
    assert_same(loaded, end.train_state)
    helpers.assert_trees_close(end.train_state.params, single_device.train_state.params, atol=5e-5)
