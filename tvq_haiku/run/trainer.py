"""The training loop: batches in, checkpoints out, and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import os
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp

from tvq_haiku.checkpoint import checkpoint_writer, checkpoints, run_directory
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data import packing, prefetch
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import best_checkpoint, reporter
from tvq_haiku.run.metric_writers import RecordMetrics
from tvq_haiku.training import nan_debug
from tvq_haiku.training import train_step as train_step_lib
from tvq_haiku.utils import files, progress


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
  previous = {
    number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


# Of parameters: what validation finds, `loss_lm` among it; None if the request came first.
Validate = Callable[[Any, object], Mapping[str, float] | None]


def resume_or_initialize(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  workdir: str | os.PathLike,
  *,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  params: Any = None,
) -> checkpoints.Checkpoint:
  """Where the run of a directory stands: at its newest checkpoint that is whole, or at its beginning.

  Args:
    config: the model.
    train_cfg: how it is trained.
    workdir: of the run. What is damaged there is moved to damaged/, with a warning.
    seed: of parameters and dropout.
    mesh: where to put it.
    params: to begin with, instead of fresh ones.

  Raises:
    CheckpointError: the directory holds a run of another configuration or seed, or nothing of it can
      be read.
  """
  init_rng, rng = jax.random.split(jax.random.key(seed))
  if run_directory.has_checkpoint(workdir):
    run_directory.check_same_run(workdir, config, train_cfg)
    saved = checkpoints.load_checkpoint(workdir, mesh=mesh)
    if (jax.random.key_data(saved.rng) != jax.random.key_data(rng)).any():
      raise checkpoints.CheckpointError(
        f"{workdir} holds a run of another seed than {seed}. Use its seed, or another directory."
      )
    run_directory.set_aside_later(workdir, after=int(saved.train_state.step))
    return saved
  multihost.barrier("start")  # before anyone writes
  state = train_step_lib.init_train_state(config, train_cfg, init_rng, params, mesh=mesh)
  return checkpoints.Checkpoint(config, train_cfg, state, rng, 0)


def fit(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  batches: packing.PackedBatches,
  workdir: str | os.PathLike,
  *,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  begin: checkpoints.Checkpoint | None = None,
  save_seconds: float = 60.0,
  max_to_keep: int = 2,
  token_name: str = "token",
  record: RecordMetrics | None = None,
  log_every: int = 10,
  peak_flops: float | None = None,
  validate: Validate | None = None,
  validate_every: int = 1000,
  max_skipped: int = 20,
  debug_nans: bool = False,
) -> checkpoints.Checkpoint:
  """Trains to `n_max_step` updates, from the newest checkpoint of `workdir` if there is one.

  Saves every `save_seconds`, before each validation, at the end, and when Ctrl-C or SIGTERM asks it
  to end early; in the background, while training goes on. The last batch is finished, even if it
  makes more updates than `n_max_step`. Updates whose loss or gradients are not finite are skipped.

  Args:
    config: the model.
    train_cfg: how to train; the batches must have its sizes.
    batches: their position is set to where the checkpoint was taken. Of several hosts, each has
      its share: see `sharding.process_share`.
    workdir: of the run, which all hosts share.
    seed: of parameters and dropout.
    mesh: devices that share the work; None: one.
    begin: from `resume_or_initialize`, with the same arguments; None: calls it.
    save_seconds: time between checkpoints.
    max_to_keep: so many of the last checkpoints are kept.
    token_name: what progress calls a token, such as "byte".
    record: gets the metrics of the last batch (means over its updates), speed, and use of codes. Of
      several hosts, only the first needs one.
    log_every: updates between two records.
    peak_flops: of the machine, to record what share of them the model gets.
    validate: called between two batches; the best checkpoint is kept under `best`.
    validate_every: updates between two validations; there is one at the end, too.
    max_skipped: so many skipped updates in a row end the run.
    debug_nans: the first skipped update ends it, after its step was computed again without
      compiling, to name the first tensor that is not finite. Keeps a copy of everything.

  Returns:
    The last checkpoint; its step is short of `n_max_step` if the run was asked to end.

  Raises:
    CheckpointError: see `resume_or_initialize`.
    NumericalError: too many updates in a row were skipped.
    OSError: something cannot be written.
  """
  for name, value in (
    ("log_every", log_every),
    ("validate_every", validate_every),
    ("max_skipped", max_skipped),
    ("max_to_keep", max_to_keep),
  ):
    if value < 1:
      raise ValueError(f"fit: {name}={value!r} must be at least 1.")
  workdir = files.prepare_directory(workdir)
  per_batch = train_cfg.updates_per_step
  n_batches = -(-train_cfg.n_max_step // per_batch)
  now = (
    resume_or_initialize(config, train_cfg, workdir, seed=seed, mesh=mesh)
    if begin is None
    else begin
  )
  batches.step = now.data_step
  if now.data_step >= n_batches and (validate is None or _was_validated(workdir, now)):
    return now

  def reaches(done: int, every: int) -> bool:
    return done * per_batch // every > (done - 1) * per_batch // every or done == n_batches

  if now.data_step and multihost.is_main_process():
    progress.log(f"going on after {int(now.train_state.step)} of {n_batches * per_batch} updates")
  step = train_step_lib.make_train_step(config, train_cfg, mesh)
  place = (
    jax.device_put
    if mesh is None
    else functools.partial(sharding.put_batch, mesh=mesh, n_row=train_cfg.global_batch_size)
  )
  with (
    stop_on_signals() as request,
    checkpoint_writer.CheckpointWriter(
      workdir, config, train_cfg, max_to_keep=max_to_keep
    ) as writer,
    prefetch.to_device(batches, device_put=place) as ready,
    progress.bar(
      "training",
      n_batches * per_batch,
      now.data_step * per_batch,
      enabled=multihost.is_main_process(),
    ) as shown,
  ):
    votes = multihost.StopVote()
    report = reporter.Reporter(
      config,
      train_cfg,
      shown,
      record,
      token_name=token_name,
      peak_flops=peak_flops,
      is_shown=multihost.is_main_process(),
    )

    def check() -> bool:
      """Whether validation came to its end; if not, none of the hosts' did."""
      writer.wait()
      found = validate(now.train_state.params, multihost.SharedStopRequest(request))
      if found is not None:
        report.validation(int(now.train_state.step), found)
        best_checkpoint.keep_best(workdir, now, found["loss_lm"])
      return found is not None

    def judge(batch: Any, before: train_step_lib.TrainState | None = None) -> None:
      """Ends the run if too many updates were skipped, of which `batch` had the last."""
      if report.skipped_in_a_row >= (1 if debug_nans else max_skipped):
        writer.wait()
        raise _numerical_error(config, train_cfg, workdir, before, state, batch, now.rng, report)

    # The process may have died, or been asked to end, after the checkpoint and before this.
    if (
      validate
      and now.data_step
      and reaches(now.data_step, validate_every)
      and not _was_validated(workdir, now)
      and not check()
    ):
      return now
    state, saved, last_batch = now.train_state, time.monotonic(), None
    for done in range(now.data_step + 1, n_batches + 1):
      batch = next(ready)
      before = jax.tree.map(jnp.copy, state) if debug_nans else None
      state, metrics = step(state, batch, now.rng)
      report.step(done * per_batch, metrics, log=reaches(done, log_every))
      judge(last_batch)  # what is known now is of the step before
      last_batch = batch
      if debug_nans:
        report.flush()
        judge(batch, before)
      if step.n_compiled() > 1:
        raise RuntimeError(f"the training step was compiled again at update {done * per_batch}.")
      checks = validate is not None and reaches(done, validate_every)
      stop, due = votes(request, time.monotonic() - saved > save_seconds)
      if stop or checks or done == n_batches or due:
        report.flush()
        judge(batch)
        now = now._replace(train_state=state, data_step=done)
        writer.save(now)
        if checks and not stop and not check():
          break
        votes.forget()
        report.start_clock()
        saved = time.monotonic()
      if stop:
        break
  return now


def _numerical_error(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  workdir: os.PathLike,
  before: train_step_lib.TrainState | None,
  state: train_step_lib.TrainState,
  batch: Any,
  rng: jax.Array,
  report: reporter.Reporter,
) -> nan_debug.NumericalError:
  """What to say when updates were skipped; names the first tensor that is to blame, if it can."""
  last = report.last_skipped
  if before is None:  # skipped updates changed nothing else, and at most one batch came after them
    n = train_cfg.updates_per_step
    before = state._replace(step=jnp.full_like(state.step, (last - 1) // n * n))
  first = "what it comes from can only be looked for on one host"
  if jax.process_count() == 1:
    given = train_step_lib.replay_to_skipped(config, train_cfg, before, batch, rng)
    found = nan_debug.first_non_finite(config, **given) if given else None
    first = (
      f"the first that is not finite is the {found}"
      if found
      else "computed again with the parameters of now, the last of them is finite"
    )
  n, saved = report.skipped_in_a_row, run_directory.latest_step(workdir)
  return nan_debug.NumericalError(
    f"{n} update{'s' if n > 1 else ''} in a row had a loss or gradients that are not finite, to update "
    f"{last}: {first}. "
    + ("Nothing was saved yet." if saved is None else f"{workdir} is as of step {saved}.")
  )


def _was_validated(workdir: os.PathLike, now: checkpoints.Checkpoint) -> bool:
  return best_checkpoint.read_validations(workdir).step >= int(now.train_state.step)
