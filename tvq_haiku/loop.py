"""The training loop: batches in, checkpoints out, and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import os
import signal
import threading
import time
from typing import Any

import jax

from tvq_haiku import checkpoints
from tvq_haiku import files
from tvq_haiku import progress
from tvq_haiku import reports
from tvq_haiku import train
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data import packing
from tvq_haiku.data import prefetch
from tvq_haiku.records import Record


class StopRequest:
  """Becomes true when the user, or the system, asks the loop to end."""

  def __init__(self):
    self._asked = False

  def __bool__(self) -> bool:
    return self._asked

  def ask(self, *_) -> None:
    self._asked = True
    # A second signal ends the process at once; the last checkpoint is whole either way.
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
  """Ctrl-C and SIGTERM set the request instead of breaking off in the middle of a step."""
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request  # signals only reach the main thread
    return
  previous = {number: signal.signal(number, request.ask)
              for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


# Of parameters: what validation finds, `loss_lm` among it; None if the request came first.
Validate = Callable[[Any, StopRequest], Mapping[str, float] | None]


def fit(
    config: TransformerConfig,
    train_cfg: TrainConfig,
    batches: packing.PackedBatches,
    workdir: str | os.PathLike,
    *,
    seed: int = 0,
    save_seconds: float = 60.0,
    token_name: str = "token",
    record: Record | None = None,
    log_every: int = 10,
    peak_flops: float | None = None,
    validate: Validate | None = None,
    validate_every: int = 1000,
) -> checkpoints.Checkpoint:
  """Trains to `n_max_step` updates, from the newest checkpoint of `workdir` if there is one.

  Saves every `save_seconds`, before each validation, at the end, and when Ctrl-C or SIGTERM asks it
  to end early. The last batch is finished, even if it makes more updates than `n_max_step`.

  Args:
    config: the model.
    train_cfg: how to train; the batches must have its sizes.
    batches: their position is set to where the checkpoint was taken.
    workdir: of the run.
    seed: of parameters and dropout.
    save_seconds: time between checkpoints.
    token_name: what progress calls a token, such as "byte".
    record: gets the metrics of the last batch (means over its updates), speed, and use of codes.
    log_every: updates between two records.
    peak_flops: of the machine, to record what share of them the model gets.
    validate: called between two batches; the best checkpoint is kept under `best`.
    validate_every: updates between two validations; there is one at the end, too.

  Returns:
    The last checkpoint; its step is short of `n_max_step` if the run was asked to end.
  """
  for name, value in (("log_every", log_every), ("validate_every", validate_every)):
    if value < 1:
      raise ValueError(f"fit: {name}={value!r} must be at least 1.")
  workdir = files.prepare_directory(workdir)
  per_batch = train_cfg.updates_per_step
  n_batches = -(-train_cfg.n_max_step // per_batch)
  now = _start(config, train_cfg, workdir, seed)
  batches.step = now.data_step
  if now.data_step >= n_batches and (validate is None or _was_validated(workdir, now)):
    return now

  def reaches(done: int, every: int) -> bool:
    return done * per_batch // every > (done - 1) * per_batch // every or done == n_batches

  if now.data_step:
    progress.say(f"going on after {int(now.train_state.step)} of {n_batches * per_batch} updates")
  step = train.make_train_step(config, train_cfg)
  with stop_on_signals() as stop, prefetch.to_device(batches) as ready, progress.show(
      "training", n_batches * per_batch, now.data_step * per_batch) as shown:
    report = reports.Report(config, train_cfg, shown, record, token_name=token_name, peak_flops=peak_flops)

    def check() -> None:
      found = validate(now.train_state.params, stop)
      if found is not None:
        report.validation(int(now.train_state.step), found)
        checkpoints.keep_best(workdir, now, found["loss_lm"])

    # The process may have died, or been asked to end, after the checkpoint and before this.
    if validate and now.data_step and reaches(now.data_step, validate_every) and not _was_validated(
        workdir, now):
      check()
    state, saved = now.train_state, time.monotonic()
    for done in range(now.data_step + 1, n_batches + 1):
      if stop and now.data_step == done - 1:
        break  # while it was validated
      state, metrics = step(state, next(ready), now.rng)
      report.step(done * per_batch, metrics, state.params, log=reaches(done, log_every))
      checks = validate is not None and reaches(done, validate_every)
      if stop or checks or done == n_batches or time.monotonic() - saved > save_seconds:
        report.flush()
        now = now._replace(train_state=state, data_step=done)
        checkpoints.save_checkpoint(workdir, now)
        if checks and not stop:
          check()
        report.start_clock()
        saved = time.monotonic()
  return now


def _was_validated(workdir: os.PathLike, now: checkpoints.Checkpoint) -> bool:
  return checkpoints.validated(workdir).step >= int(now.train_state.step)


def _start(config: TransformerConfig, train_cfg: TrainConfig, workdir: os.PathLike,
           seed: int) -> checkpoints.Checkpoint:
  init_rng, rng = jax.random.split(jax.random.key(seed))
  if checkpoints.exists(workdir):
    checkpoints.check_same_run(workdir, config, train_cfg)
    if checkpoints.latest_step(workdir) is not None:
      saved = checkpoints.load_checkpoint(workdir)
      if (jax.random.key_data(saved.rng) != jax.random.key_data(rng)).any():
        raise checkpoints.CheckpointError(
            f"{workdir} holds a run of another seed than {seed}. Use its seed, or another directory.")
      return saved
  state = train.init_train_state(config, train_cfg, init_rng)
  return checkpoints.Checkpoint(config, train_cfg, state, rng, 0)
