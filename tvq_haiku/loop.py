"""The training loop: batches in, checkpoints out, and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import math
import os
import signal
import threading
import time

import jax

from tvq_haiku import checkpoints
from tvq_haiku import files
from tvq_haiku import progress
from tvq_haiku import train
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data import packing


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


def fit(
    config: TransformerConfig,
    train_cfg: TrainConfig,
    batches: packing.PackedBatches,
    workdir: str | os.PathLike,
    *,
    seed: int = 0,
    save_seconds: float = 60.0,
    token_name: str = "token",
) -> checkpoints.Checkpoint:
  """Trains to `n_max_step` updates, from the newest checkpoint of `workdir` if there is one.

  Saves every `save_seconds`, at the end, and when Ctrl-C or SIGTERM asks it to end early.

  Args:
    config: the model.
    train_cfg: how to train; the batches must have its sizes.
    batches: their position is set to where the checkpoint was taken.
    workdir: of the run.
    seed: of parameters and dropout.
    save_seconds: time between checkpoints.
    token_name: what progress calls a token, such as "byte".

  Returns:
    The last checkpoint; its step is short of `n_max_step` if the run was asked to end.
  """
  if train_cfg.n_max_step % train_cfg.updates_per_step:
    raise ValueError(f"fit: n_max_step={train_cfg.n_max_step} must be a multiple of the "
                     f"{train_cfg.updates_per_step} updates that one batch makes.")
  workdir = files.prepare_directory(workdir)
  n_batches = train_cfg.n_max_step // train_cfg.updates_per_step
  now = _start(config, train_cfg, workdir, seed)
  batches.step = now.data_step
  if now.data_step >= n_batches:
    return now
  step = train.make_train_step(config, train_cfg)
  tokens_per_batch = train_cfg.global_batch_size * train_cfg.sequence_len
  state, previous, average, saved = now.train_state, None, None, time.monotonic()
  clock = _Throughput()
  with stop_on_signals() as stop, progress.show(
      "training", train_cfg.n_max_step, int(now.train_state.step)) as shown:
    for done in range(now.data_step + 1, n_batches + 1):
      state, metrics = step(state, next(batches), now.rng)
      # The metrics of the step before are ready: reading them keeps no device waiting.
      for loss in [] if previous is None else jax.device_get(previous["loss_lm"]):
        average = loss if average is None else 0.98 * average + 0.02 * loss
      previous = metrics
      rate = clock.tick(tokens_per_batch)
      note = "compiled" if average is None else (
          f"{average / math.log(2):.3f} bits per {token_name}  {rate:,.0f} tokens/s")
      shown(done * train_cfg.updates_per_step, note)
      last = stop or done == n_batches
      if last or time.monotonic() - saved > save_seconds:
        now = now._replace(train_state=state, data_step=batches.step)
        checkpoints.save_checkpoint(workdir, now)
        saved = time.monotonic()
      if last:
        break
  return now


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


class _Throughput:
  """Tokens per second since the first tick, which pays for compilation."""

  def __init__(self):
    self._start = None
    self._tokens = 0

  def tick(self, tokens: int) -> float:
    now = time.monotonic()
    if self._start is None:
      self._start = now
      return 0.0
    self._tokens += tokens
    return self._tokens / (now - self._start)
