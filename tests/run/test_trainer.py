"""The training loop: when it saves, validates and stops, and that resuming changes no result."""

import os
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.run import best_checkpoint, trainer
from tvq_haiku.run.trainer import TrainerOptions
from tvq_haiku.training import train_step as train_step_lib

import helpers
from helpers import assert_same

pytestmark = pytest.mark.slow

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING
make_batches = helpers.run_batches
EVERY_4 = TrainerOptions(validate_every=4)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """The directory and the last checkpoint of a run that was never stopped."""
  workdir = tmp_path_factory.mktemp("uninterrupted")
  return workdir, trainer.fit(CONFIG, TRAIN, make_batches(), workdir)


def call_before_step(monkeypatch, n, function):
  """Calls `function` before the n-th training step of each run that starts from now on."""
  make_train_step = train_step_lib.make_train_step

  def make(config, train_cfg, mesh):
    step = make_train_step(config, train_cfg, mesh)
    calls = []

    def counting_step(*args):
      calls.append(None)
      if len(calls) == n:
        function()
      return step(*args)

    counting_step.n_compiled = step.n_compiled
    return counting_step

  monkeypatch.setattr(train_step_lib, "make_train_step", make)


def losses_in_turn(losses):
  """Returns a validation function that returns one of `losses` at each call, in order."""
  remaining = iter(losses)
  return lambda params, stop: {"loss_lm": next(remaining)}


def test_stopped_and_resumed_run_equals_an_uninterrupted_one(uninterrupted, tmp_path, monkeypatch):
  """The states are equal bit for bit, even if the default kind of random keys has changed."""
  for i, number in enumerate((signal.SIGINT, signal.SIGTERM)):
    with monkeypatch.context() as patch:
      call_before_step(patch, 2, lambda: os.kill(os.getpid(), number))
      stopped = trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)
    assert int(stopped.train_state.step) == 4 * (i + 1)  # the step during the signal is completed
    assert run_directory.saved_steps(tmp_path)[-1] == 4 * (i + 1)
  with jax.default_prng_impl("rbg"):
    resumed = trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)
  assert resumed.data_step == uninterrupted[1].data_step == 6
  assert_same(resumed.train_state, uninterrupted[1].train_state)
  assert_same(tvq.load_checkpoint(tmp_path).train_state, uninterrupted[1].train_state)


def test_resumed_run_keeps_its_kind_of_random_keys(tmp_path):
  with jax.default_prng_impl("rbg"):
    started = trainer.resume_or_initialize(CONFIG, TRAIN, tmp_path, seed=3)
  tvq.save_checkpoint(tmp_path, started)
  resumed = trainer.resume_or_initialize(CONFIG, TRAIN, tmp_path, seed=3)
  assert jax.random.key_impl(resumed.rng) == "rbg"
  assert_same(jax.random.key_data(resumed.rng), jax.random.key_data(started.rng))
  with pytest.raises(tvq.CheckpointError, match="different seed than 4"):
    trainer.resume_or_initialize(CONFIG, TRAIN, tmp_path, seed=4)


def test_resuming_is_logged(tmp_path, capsys, monkeypatch):
  call_before_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
  trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)
  assert "resuming" not in capsys.readouterr().err
  monkeypatch.undo()
  trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)
  assert "resuming after 4 of 12 updates\n" in capsys.readouterr().err


def test_last_batch_is_completed(tmp_path):
  """The last batch of 2 updates makes the 12th update, although 11 are configured."""
  end = trainer.fit(CONFIG, TRAIN.replace(n_max_step=11), make_batches(), tmp_path)
  assert int(end.train_state.step) == 12 and end.data_step == 6


def test_run_of_a_single_batch(tmp_path, capsys):
  train_cfg = TRAIN.replace(n_max_step=1, n_warmup_step=0)
  end = trainer.fit(CONFIG, train_cfg, make_batches(), tmp_path)
  assert int(end.train_state.step) == 2 and "training 2/2" in capsys.readouterr().err


def test_metrics_are_recorded_and_the_best_checkpoint_is_kept(tmp_path):
  records = []
  trainer.fit(
    CONFIG,
    TRAIN,
    make_batches(),
    tmp_path,
    validate=losses_in_turn([3.0, 2.0, 2.5]),
    record=lambda step, metrics: records.append((step, dict(metrics))),
    options=TrainerOptions(validate_every=4, log_every=4),
  )
  assert best_checkpoint.read_validations(tmp_path)[:3] == (12, 8, 2.0)
  assert int(tvq.load_checkpoint(tmp_path / "best").train_state.step) == 8
  validations = [(step, metrics) for step, metrics in records if "validation_loss_lm" in metrics]
  assert validations == [
    (step, {"validation_loss_lm": loss}) for step, loss in ((4, 3.0), (8, 2.0), (12, 2.5))
  ]
  training = [(step, metrics) for step, metrics in records if "loss_lm" in metrics]
  assert [step for step, _ in training] == [4, 8, 12]
  names = {"loss_lm", "grad_norm", "learning_rate", "code_perplexity", "code_use"}
  assert all(names <= metrics.keys() for _, metrics in training)


def test_interval_ends_with_the_batch_that_reaches_it(tmp_path):
  """With 2 updates per batch, `log_every=3` records after updates 4, 6, 10 and 12."""
  steps = []
  trainer.fit(
    CONFIG,
    TRAIN,
    make_batches(),
    tmp_path,
    record=lambda step, metrics: steps.append(step),
    options=TrainerOptions(log_every=3),
  )
  assert steps == [4, 6, 10, 12]


def test_validated_checkpoint_is_on_disk(tmp_path):
  """A validation starts only when the checkpoint that it validates has been written."""
  seen = []

  def validate(params, stop):
    checkpoint = tvq.load_checkpoint(tmp_path)
    assert_same(checkpoint.train_state.params, params)
    seen.append(int(checkpoint.train_state.step))
    return {"loss_lm": 1.0}

  trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path, validate=validate, options=EVERY_4)
  assert seen == [4, 8, 12]


def test_interrupted_validation_is_repeated(tmp_path):
  losses = [3.0, 2.0, 1.0]
  n_left = []

  def validate(params, stop):
    n_left.append(len(losses))
    if len(n_left) == 2:  # the second validation is interrupted
      assert not stop
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop
      return None
    return {"loss_lm": losses.pop(0)}

  stopped = trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path, validate=validate, options=EVERY_4)
  assert int(stopped.train_state.step) == 8
  assert best_checkpoint.read_validations(tmp_path)[:3] == (4, 4, 3.0)
  end = trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path, validate=validate, options=EVERY_4)
  assert int(end.train_state.step) == 12
  assert best_checkpoint.read_validations(tmp_path)[:3] == (12, 12, 1.0)
  assert n_left == [3, 2, 2, 1]


def test_completed_validation_is_not_repeated(tmp_path, monkeypatch):
  def die():
    raise KeyboardInterrupt

  fit = lambda validate: trainer.fit(
    CONFIG, TRAIN, make_batches(), tmp_path, validate=validate, options=EVERY_4
  )
  with monkeypatch.context() as patch:
    call_before_step(patch, 3, die)  # the first step after the validation at update 4
    with pytest.raises(KeyboardInterrupt):
      fit(losses_in_turn([3.0]))
  assert best_checkpoint.read_validations(tmp_path)[:3] == (4, 4, 3.0)
  fit(losses_in_turn([2.0, 1.0]))
  assert best_checkpoint.read_validations(tmp_path)[:3] == (12, 12, 1.0)


def test_interrupted_last_validation_is_repeated(uninterrupted, tmp_path):
  stop_at_once = lambda params, stop: None
  for validate, step in ((stop_at_once, -1), (losses_in_turn([2.0]), 12)):
    end = trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path, validate=validate)
    assert_same(end.train_state, uninterrupted[1].train_state)
    assert best_checkpoint.read_validations(tmp_path).step == step
  trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path, validate=losses_in_turn([]))  # not called


def test_every_batch_is_saved_if_save_seconds_is_zero(tmp_path):
  records, options = [], TrainerOptions(save_seconds=0.0, log_every=1, max_to_keep=9)
  trainer.fit(
    CONFIG,
    TRAIN,
    make_batches(),
    tmp_path,
    record=lambda step, metrics: records.append(metrics),
    options=options,
  )
  assert run_directory.saved_steps(tmp_path) == [2, 4, 6, 8, 10, 12]
  assert "tokens_per_second" not in records[0]  # the first step compiles
  assert len(records) == 6
  assert all(metrics["tokens_per_second"] > 0 for metrics in records[1:])


def test_jumps_of_the_system_clock_change_nothing(uninterrupted, tmp_path, monkeypatch):
  jumps, offset, real_time = iter([86_400.0, -86_400.0, 0.0]), [0.0], time.time
  monkeypatch.setattr(time, "time", lambda: real_time() + offset[0])

  def validate(params, stop):
    offset[0] = next(jumps)
    return {"loss_lm": 1.0}

  end = trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path, validate=validate, options=EVERY_4)
  assert run_directory.saved_steps(tmp_path) == [8, 12]  # none because of elapsed time
  assert_same(end.train_state, uninterrupted[1].train_state)
  assert_same(tvq.load_checkpoint(tmp_path).train_state, uninterrupted[1].train_state)


def test_second_compilation_is_an_error(tmp_path, monkeypatch):
  make_train_step = train_step_lib.make_train_step

  def make(*args):
    step = make_train_step(*args)
    recompiled_step = lambda *args: step(*args)
    recompiled_step.n_compiled = lambda: 2
    return recompiled_step

  monkeypatch.setattr(train_step_lib, "make_train_step", make)
  with pytest.raises(RuntimeError, match="training was compiled again at update 2"):
    trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)


def test_finished_run_is_not_trained_again(uninterrupted, monkeypatch):
  workdir, checkpoint = uninterrupted
  call_before_step(monkeypatch, 1, lambda: pytest.fail("a step was made"))
  again = trainer.fit(CONFIG, TRAIN, make_batches(), workdir)
  assert_same(again.train_state, checkpoint.train_state)


def test_extended_run_equals_one_that_was_longer_from_the_start(uninterrupted, tmp_path):
  """A finished run continues at the last learning rate of its schedule."""
  longer, rates = TRAIN.replace(n_extra_step=4), {}
  extended_dir = shutil.copytree(uninterrupted[0], tmp_path / "extended")
  extended = trainer.fit(
    CONFIG,
    longer,
    make_batches(),
    extended_dir,
    record=lambda step, metrics: rates.update({step: metrics["learning_rate"]}),
    options=TrainerOptions(log_every=1),
  )
  assert int(extended.train_state.step) == 16 and extended.train_cfg == longer
  np.testing.assert_allclose([rates[14], rates[16]], 0.1 * TRAIN.lr_max, rtol=1e-6)
  assert tvq.load_checkpoint(extended_dir).train_cfg == longer
  from_start = trainer.fit(CONFIG, longer, make_batches(), tmp_path / "from start")
  assert_same(extended.train_state, from_start.train_state)


def test_loop_runs_outside_of_the_main_thread(tmp_path):
  results = []
  train_cfg = TRAIN.replace(n_max_step=4)
  worker = threading.Thread(
    target=lambda: results.append(trainer.fit(CONFIG, train_cfg, make_batches(), tmp_path))
  )
  worker.start()
  worker.join()
  assert int(results[0].train_state.step) == 4


def test_returned_checkpoint_equals_the_newest_on_disk(uninterrupted):
  workdir, checkpoint = uninterrupted
  loaded = tvq.load_checkpoint(workdir)
  assert (loaded.config, loaded.train_cfg, loaded.data_step) == (CONFIG, TRAIN, 6)
  assert checkpoint.data_step == 6
  assert_same(loaded.train_state, checkpoint.train_state)
  assert_same(jax.random.key_data(loaded.rng), jax.random.key_data(checkpoint.rng))
  assert jax.tree.structure(loaded.train_state) == jax.tree.structure(checkpoint.train_state)


def test_checkpoints_without_their_config_are_rejected(tmp_path):
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(4))
  (tmp_path / "config.json").unlink()
  with pytest.raises(tvq.CheckpointError, match=r"holds checkpoints but no config\.json"):
    trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)


def test_another_seed_is_rejected(uninterrupted):
  with pytest.raises(tvq.CheckpointError, match=r"seed mismatch: .* a different seed than 99"):
    trainer.fit(CONFIG, TRAIN, make_batches(), uninterrupted[0], seed=99)


def test_another_configuration_is_rejected_and_its_fields_are_named(uninterrupted):
  config, train_cfg = CONFIG.replace(n_code=7), TRAIN.replace(lr_max=0.02)
  message = r"n_code is 6 in the run, 7 here; lr_max is 0.01 in the run, 0.02 here"
  with pytest.raises(tvq.CheckpointError, match=message):
    trainer.fit(config, train_cfg, make_batches(), uninterrupted[0])


def test_directory_that_is_not_writable_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"cannot write to the directory .*file/run: Not a directory"):
    trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path / "file" / "run")
