"""The loop and its checkpoints: what is saved is what goes on."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.evaluation import likelihood
from tvq_haiku.run import best_checkpoint, reporter, trainer
from tvq_haiku.training import train_step as train_step_lib

import helpers
from helpers import assert_same

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING
make_batches = helpers.run_batches


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run that was never stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, trainer.fit(CONFIG, TRAIN, make_batches(), workdir)


def test_stopped_and_resumed_equals_never_stopped(finished, tmp_path, monkeypatch):
  """Signals ask a run to end; what follows must be as if they had not, bit for bit."""
  make_step = train_step_lib.make_train_step
  for ask in (signal.SIGINT, signal.SIGTERM):

    def interrupted(config, train_cfg, mesh, ask=ask):
      step = make_step(config, train_cfg, mesh)
      seen = []

      def count(*args):
        seen.append(1)
        if len(seen) == 2:
          os.kill(os.getpid(), ask)
        return step(*args)

      count.n_compiled = step.n_compiled
      return count

    monkeypatch.setattr(train_step_lib, "make_train_step", interrupted)
    halted = trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)
    assert int(halted.train_state.step) < TRAIN.n_max_step
  monkeypatch.undo()
  resumed = trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)
  assert resumed.data_step == finished[1].data_step == 6
  assert_same(resumed.train_state, finished[1].train_state)
  assert_same(tvq.load_checkpoint(tmp_path).train_state, finished[1].train_state)


def validator(losses, asked=None):
  """A validation that finds the given losses in turn, and may ask to stop on the way."""

  def validate(params, stop):
    if asked and len(losses) == asked.pop(0):
      os.kill(os.getpid(), signal.SIGTERM)
      return None
    return {"loss_lm": losses.pop(0)}

  return validate


def test_the_last_batch_is_finished_and_validation_keeps_the_best(finished, tmp_path):
  train_cfg = TRAIN.replace(n_max_step=11)  # of 2 updates each: 12 in all
  lines = []
  end = trainer.fit(
    CONFIG,
    train_cfg,
    make_batches(),
    tmp_path,
    validate=validator([3.0, 2.0, 2.5]),
    options=trainer.TrainerOptions(validate_every=4, log_every=4),
    record=lambda step, values: lines.append((step, dict(values))),
  )
  assert int(end.train_state.step) == 12
  assert best_checkpoint.read_validations(tmp_path) == (12, 8, 2.0)
  assert int(tvq.load_checkpoint(tmp_path / "best").train_state.step) == 8
  assert [line for line in lines if "validation_loss_lm" in line[1]] == [
    (step, {"validation_loss_lm": loss}) for step, loss in ((4, 3.0), (8, 2.0), (12, 2.5))
  ]
  trained = [line for line in lines if "loss_lm" in line[1]]
  assert [step for step, _ in trained] == [4, 8, 12]
  assert {"loss_lm", "grad_norm", "learning_rate", "code_perplexity", "code_use"} <= trained[0][
    1
  ].keys()


def test_speed_is_recorded_even_if_every_batch_is_saved(tmp_path):
  lines = []
  trainer.fit(
    CONFIG,
    TRAIN,
    make_batches(),
    tmp_path,
    options=trainer.TrainerOptions(save_seconds=0.0, log_every=1, peak_flops=1e9),
    record=lambda step, values: lines.append(values),
  )
  assert len(lines) == 6 and "tokens_per_second" not in lines[0]  # the first one compiles
  assert all(line["tokens_per_second"] > 0 and line["of_peak"] > 0 for line in lines[1:])


def test_speed_is_that_since_the_last_record(monkeypatch):
  clock, rates = [0.0], []
  monkeypatch.setattr("time.monotonic", lambda: clock[0])
  report = reporter.Reporter(
    CONFIG,
    TRAIN,
    trainer.TrainerOptions(),
    lambda *_: None,
    lambda _, values: rates.append(values.get("tokens_per_second")),
  )
  metrics = {"loss_lm": np.ones(2), "skipped": np.zeros(2)}
  for seconds in (100.0, 1.0, 1.0, 4.0):  # the first one compiles
    report.report_step(2, metrics, record=True)
    clock[0] += seconds
    report.flush()
  clock[0] += 50.0  # validation
  report.restart_clock()
  report.report_step(2, metrics, record=True)
  clock[0] += 2.0
  report.flush()
  assert rates == [None, 64.0, 64.0, 16.0, 32.0]


def test_a_run_of_one_batch(tmp_path, capsys):
  end = trainer.fit(CONFIG, TRAIN.replace(n_max_step=1, n_warmup_step=0), make_batches(), tmp_path)
  assert int(end.train_state.step) == 2 and "training 2/2" in capsys.readouterr().err


def test_windows_of_one_shape_are_compiled_once():
  stream = data.stream_of([data.ByteVocabulary.encode("It was so." * 9)])
  params = helpers.random_params(CONFIG)
  tvq.evaluate(CONFIG, params, stream, batch_size=2, window_len=16)
  before = likelihood._eval_step._cache_size()
  tvq.evaluate(CONFIG, params, stream, batch_size=2, window_len=16)
  assert likelihood._eval_step._cache_size() == before


def test_validation_that_was_broken_off_is_made_up_for(tmp_path):
  found = [3.0, 2.0, 1.0]
  validate = validator(found, asked=[0, 2, 9, 9])  # the second one is asked to stop
  for step, best in ((8, 3.0), (12, 1.0)):
    now = trainer.fit(
      CONFIG,
      TRAIN,
      make_batches(),
      tmp_path,
      validate=validate,
      options=trainer.TrainerOptions(validate_every=4),
    )
    assert (
      int(now.train_state.step) == step
      and best_checkpoint.read_validations(tmp_path).best_loss == best
    )
  assert not found  # one for each of 4, 8 and 12


def test_best_that_was_saved_but_not_noted_is_noted(tmp_path):
  state = tvq.init_train_state(CONFIG, TRAIN, jax.random.key(0))._replace(step=jnp.int32(4))
  now = tvq.Checkpoint(CONFIG, TRAIN, state, jax.random.key(1), 2)
  assert best_checkpoint.keep_best(tmp_path, now, 2.0)
  (tmp_path / "validation.json").unlink()  # as if the process had died before writing it
  assert best_checkpoint.keep_best(tmp_path, now, 2.0)
  assert not best_checkpoint.keep_best(tmp_path, now, float("nan"))
  assert best_checkpoint.read_validations(tmp_path) == (4, 4, 2.0)
  (tmp_path / "validation.json").write_text("{")
  with pytest.raises(tvq.CheckpointError, match=r"validation\.json is damaged"):
    best_checkpoint.read_validations(tmp_path)


def test_a_clock_that_jumps_changes_nothing(finished, tmp_path, monkeypatch):
  jumps, now, real = iter([86_400.0, -86_400.0, 0.0]), [0.0], time.time
  monkeypatch.setattr(time, "time", lambda: real() + now[0])

  def jump(params, stop):
    now[0] = next(jumps)
    return {"loss_lm": 1.0}

  end = trainer.fit(
    CONFIG,
    TRAIN,
    make_batches(),
    tmp_path,
    validate=jump,
    options=trainer.TrainerOptions(validate_every=4),
  )
  assert run_directory.saved_steps(tmp_path) == [8, 12]  # none because it seemed to be time
  assert_same(end.train_state, finished[1].train_state)
  assert_same(tvq.load_checkpoint(tmp_path).train_state, finished[1].train_state)


def test_a_second_compilation_is_an_error(tmp_path, monkeypatch):
  make_step = train_step_lib.make_train_step

  def careless(*args):
    step = make_step(*args)

    def call(*args):
      return step(*args)

    call.n_compiled = lambda: 2
    return call

  monkeypatch.setattr(train_step_lib, "make_train_step", careless)
  with pytest.raises(RuntimeError, match="the training step was compiled again at update 2"):
    trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)


def test_a_finished_run_is_left_as_it_is(finished):
  workdir, checkpoint = finished
  again = trainer.fit(CONFIG, TRAIN, make_batches(), workdir)
  assert_same(again.train_state, checkpoint.train_state)


def test_loop_runs_outside_of_the_main_thread(tmp_path):
  results = []
  train_cfg = TRAIN.replace(n_max_step=4)
  worker = threading.Thread(
    target=lambda: results.append(trainer.fit(CONFIG, train_cfg, make_batches(), tmp_path))
  )
  worker.start()
  worker.join()
  assert int(results[0].train_state.step) == 4


class TestCheckpoints:
  def test_checkpoint_on_disk_is_the_one_returned(self, finished):
    workdir, saved = finished
    loaded = tvq.load_checkpoint(workdir)
    assert (loaded.config, loaded.train_cfg, loaded.data_step) == (CONFIG, TRAIN, saved.data_step)
    assert_same(loaded.train_state, saved.train_state)
    assert_same(jax.random.key_data(loaded.rng), jax.random.key_data(saved.rng))
    assert jax.tree.structure(loaded.train_state) == jax.tree.structure(saved.train_state)

  def test_checkpoints_without_their_config_are_refused(self, tmp_path):
    tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(4))
    (tmp_path / "config.json").unlink()
    with pytest.raises(tvq.CheckpointError, match=r"holds checkpoints but no config\.json"):
      trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path)

  def test_another_seed_is_refused(self, finished):
    with pytest.raises(tvq.CheckpointError, match="a different seed than 99"):
      trainer.fit(CONFIG, TRAIN, make_batches(), finished[0], seed=99)

  def test_another_configuration_is_refused_by_name(self, finished):
    with pytest.raises(
      tvq.CheckpointError, match=r"n_code is 6 in the run, 7 here; lr_max is 0.01 in the run, 0.02"
    ):
      trainer.fit(CONFIG.replace(n_code=7), TRAIN.replace(lr_max=0.02), make_batches(), finished[0])

  def test_directory_that_cannot_be_written(self, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write to the directory .*file/run: Not a directory"):
      trainer.fit(CONFIG, TRAIN, make_batches(), tmp_path / "file" / "run")
