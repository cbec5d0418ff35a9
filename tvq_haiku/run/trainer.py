"""The training loop: starts or resumes a run, trains, saves, validates, and stops on signals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import os
import pathlib
import time

import jax
import jax.numpy as jnp

from tvq_haiku.checkpoint import checkpoint_writer, checkpoints, run_directory
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data import packing, prefetch
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import best_checkpoint, stop_signals
from tvq_haiku.run.metric_writers import RecordMetrics
from tvq_haiku.run.reporter import Reporter
from tvq_haiku.run.trainer_options import TrainerOptions
from tvq_haiku.training import nan_debug
from tvq_haiku.training import train_step as train_step_lib
from tvq_haiku.types import Batch, Params, StopRequest
from tvq_haiku.utils import files, progress

_STOP_NOTE = (
  "finishing this batch and saving; a second Ctrl-C ends the run at once, and loses the updates "
  "since the last checkpoint"
)

# Takes parameters and a stop request. Returns the metrics of the validation split, with `loss_lm`
# in nats per token, or None if the validation was stopped.
Validate = Callable[[Params, StopRequest], Mapping[str, float] | None]


def resume_or_initialize(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  workdir: str | os.PathLike,
  *,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  params: Params | None = None,
) -> checkpoints.Checkpoint:
  """Returns the newest undamaged checkpoint of a run, or the state before its first update.

  Damaged checkpoints are moved to damaged/, with a warning.

  Args:
    config: configuration of the model.
    train_cfg: configuration of its training.
    workdir: directory of the run.
    seed: seed of the initial parameters and of dropout.
    mesh: devices on which to put the train state; None: the default device.
    params: parameters to initialize a new run from; None: random parameters.

  Raises:
    CheckpointError: the run has a different configuration or seed, or all of its checkpoints are
      damaged.
  """
  if run_directory.has_checkpoint(workdir):
    run_directory.check_same_run(workdir, config, train_cfg)
    saved = checkpoints.load_checkpoint(workdir, mesh=mesh)
    # A run keeps its kind of random keys; the default of this process may be another kind.
    _, rng = jax.random.split(jax.random.key(seed, impl=jax.random.key_impl(saved.rng)))
    if (jax.random.key_data(saved.rng) != jax.random.key_data(rng)).any():
      raise run_directory.CheckpointError(
        f"seed mismatch: {workdir} holds a run with a different seed than {seed}. Use the seed of "
        "the run, or another directory (--workdir)."
      )
    run_directory.set_aside_later(workdir, after=int(saved.train_state.step))
    return saved._replace(config=config, train_cfg=train_cfg)
  multihost.barrier("start")  # no process may write before all have seen that there is no run
  init_rng, rng = jax.random.split(jax.random.key(seed))
  state = train_step_lib.init_train_state(config, train_cfg, init_rng, params, mesh=mesh)
  return checkpoints.Checkpoint(config, train_cfg, state, rng, data_step=0)


def fit(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  batches: packing.PackedBatches,
  workdir: str | os.PathLike,
  *,
  seed: int = 0,
  mesh: jax.sharding.Mesh | None = None,
  checkpoint: checkpoints.Checkpoint | None = None,
  record: RecordMetrics | None = None,
  validate: Validate | None = None,
  options: TrainerOptions | None = None,
) -> checkpoints.Checkpoint:
  """Trains a run to the end of its updates, from its newest checkpoint if it has one.

  Saves a checkpoint every `save_seconds`, before each validation, at the end, and before stopping
  on SIGINT (Ctrl-C) or SIGTERM; checkpoints are written in the background. The last batch is always
  completed, even if the run then has more than `n_update` updates. Updates with a non-finite loss
  or gradient are skipped.

  Args:
    config: configuration of the model.
    train_cfg: configuration of its training, with the sizes of `batches`.
    batches: training batches; their `step` is set to the position of the checkpoint. With several
      processes, each has its share: see `sharding.process_share`.
    workdir: directory of the run, shared by all processes.
    seed: seed of the initial parameters and of dropout.
    mesh: devices that share the work; None: the default device.
    checkpoint: result of `resume_or_initialize` with the same arguments; None: it is called.
    record: writes the metrics of training (means over the updates of a batch, and the speed) and of
      validation; None: they are not written. With several processes, only process 0 needs it.
    validate: computes the validation metrics; the checkpoint with the lowest loss is kept under
      best/. None: no validation.
    options: options of the training loop; None: the defaults.

  Returns:
    The last checkpoint; it has fewer updates than `n_update` if the run was stopped by a signal.

  Raises:
    CheckpointError: see `resume_or_initialize`.
    NumericalError: `max_skipped` consecutive updates were skipped.
    OSError: a file cannot be written.
  """
  options = options or TrainerOptions()
  workdir = files.prepare_directory(workdir)
  if checkpoint is None:
    checkpoint = resume_or_initialize(config, train_cfg, workdir, seed=seed, mesh=mesh)
  batches.step = checkpoint.data_step
  n_batches = _n_batches(train_cfg)
  if checkpoint.data_step >= n_batches and (validate is None or _is_validated(workdir, checkpoint)):
    return checkpoint

  n_updates, is_main = n_batches * train_cfg.updates_per_step, multihost.is_main_process()
  if checkpoint.data_step and is_main:
    progress.log(f"resuming after {int(checkpoint.train_state.step)} of {n_updates} updates")
  train_step = train_step_lib.make_train_step(config, train_cfg, mesh)
  device_put = jax.device_put
  if mesh is not None:
    batch_size = train_cfg.global_batch_size
    device_put = functools.partial(sharding.put_batch, mesh=mesh, batch_size=batch_size)
  first_update = checkpoint.data_step * train_cfg.updates_per_step
  with (
    stop_signals.stop_on_signals(_STOP_NOTE) as stop_request,
    checkpoint_writer.CheckpointWriter(
      workdir,
      config,
      train_cfg,
      rng_impl=jax.random.key_impl(checkpoint.rng),
      max_to_keep=options.max_to_keep,
    ) as writer,
    prefetch.to_device(batches, device_put=device_put) as device_batches,
    progress.bar("training", n_updates, first_update, enabled=is_main) as show_progress,
  ):
    return Trainer(
      config=config,
      train_cfg=train_cfg,
      options=options,
      workdir=workdir,
      checkpoint=checkpoint,
      train_step=train_step,
      validate=validate,
      writer=writer,
      reporter=Reporter(config, train_cfg, options, show_progress, record),
      stop_request=stop_request,
    ).run(device_batches)


@dataclasses.dataclass(kw_only=True)
class Trainer:
  """The state of a training run between two batches, and the actions after each batch.

  All processes save, validate and stop after the same batch; `fit` creates the trainer.
  """

  config: TransformerConfig
  train_cfg: TrainConfig
  options: TrainerOptions
  workdir: pathlib.Path  # directory of the run
  checkpoint: checkpoints.Checkpoint  # the last saved one, or the one to start from
  train_step: train_step_lib.TrainStep
  validate: Validate | None  # None: the run has no validation
  writer: checkpoint_writer.CheckpointWriter
  reporter: Reporter
  stop_request: StopRequest  # of this process

  def __post_init__(self):
    self._train_state = self.checkpoint.train_state
    self._n_batches = _n_batches(self.train_cfg)
    self._votes = multihost.StopVote()
    self._last_batch: Batch | None = None
    self._last_save = time.monotonic()  # seconds

  def run(self, batches: Iterator[Batch]) -> checkpoints.Checkpoint:
    """Trains on the remaining batches, and returns the last checkpoint."""
    if not self._catch_up_validation():
      return self.checkpoint
    self._last_save = time.monotonic()
    for n in range(self.checkpoint.data_step + 1, self._n_batches + 1):
      self._train_on(next(batches), n)
      if not self._save_and_validate(n):
        break
    return self.checkpoint

  def _is_due(self, n: int, every: int) -> bool:
    """Returns whether batch `n` reaches a multiple of `every` updates, or is the last batch."""
    updates = self.train_cfg.updates_per_step
    return n * updates // every > (n - 1) * updates // every or n == self._n_batches

  def _train_on(self, batch: Batch, n: int) -> None:
    """Trains on batch `n`, counted from 1, and reports the previous batch.

    With `debug_nans`, it reports this batch, too, for which the host waits for the devices.
    """
    debug_nans = self.options.debug_nans
    state_before = jax.tree.map(jnp.copy, self._train_state) if debug_nans else None
    self._train_state, metrics = self.train_step(self._train_state, batch, self.checkpoint.rng)
    update = n * self.train_cfg.updates_per_step
    self.reporter.report_batch(update, metrics, record=self._is_due(n, self.options.log_every))
    self._check_skipped(self._last_batch)  # `batch` itself is not reported yet
    self._last_batch = batch
    if debug_nans:
      self.reporter.flush()
      self._check_skipped(batch, state_before)
    if self.train_step.n_compiled() > 1:
      raise RuntimeError(
        f"training was compiled again at update {update}; all batches must have the same shapes "
        "and types."
      )

  def _save_and_validate(self, n: int) -> bool:
    """Saves and validates after batch `n` if that is due; returns whether to continue."""
    is_validation_due = self.validate is not None and self._is_due(n, self.options.validate_every)
    is_save_due = time.monotonic() - self._last_save > self.options.save_seconds
    stop, is_save_due = self._votes(self.stop_request, is_save_due)
    if not (stop or is_validation_due or is_save_due or n == self._n_batches):
      return True
    self._save(n)
    if is_validation_due and not stop and not self._run_validation():
      return False
    self._votes.forget()
    self.reporter.restart_clock()
    self._last_save = time.monotonic()
    return not stop

  def _save(self, n: int) -> None:
    """Saves a checkpoint after batch `n`; raises if too many consecutive updates were skipped."""
    self.reporter.flush()
    self._check_skipped(self._last_batch)
    self.checkpoint = self.checkpoint._replace(train_state=self._train_state, data_step=n)
    self.writer.save(self.checkpoint)

  def _catch_up_validation(self) -> bool:
    """Validates the initial checkpoint if that is due and an earlier process has not completed it.

    Returns:
      Whether to continue; False if a stop was requested during the validation.
    """
    n = self.checkpoint.data_step
    if (
      self.validate is None
      or n == 0
      or not self._is_due(n, self.options.validate_every)
      or _is_validated(self.workdir, self.checkpoint)
    ):
      return True
    return self._run_validation()

  def _run_validation(self) -> bool:
    """Validates the last checkpoint.

    Returns:
      Whether to continue; False, in all processes, if a stop was requested in one of them.
    """
    self.writer.wait()
    metrics = self.validate(
      self.checkpoint.train_state.params, multihost.SharedStopRequest(self.stop_request)
    )
    if metrics is None:
      return False
    self.reporter.report_validation(int(self.checkpoint.train_state.step), metrics)
    best_checkpoint.keep_best(self.workdir, self.checkpoint, metrics)
    return True

  def _check_skipped(
    self, batch: Batch | None, state_before: train_step_lib.TrainState | None = None
  ) -> None:
    """Ends the run if too many consecutive updates were skipped.

    Args:
      batch: the last reported batch; None if there is none.
      state_before: train state before that batch; None: it was not kept.

    Raises:
      NumericalError: the limit is reached.
    """
    limit = 1 if self.options.debug_nans else self.options.max_skipped
    if self.reporter.skipped_in_a_row < limit:
      return
    self.writer.wait()
    count, last = self.reporter.skipped_in_a_row, self.reporter.last_skipped
    updates = f"update {last} was" if count == 1 else f"updates {last - count + 1} to {last} were"
    saved = run_directory.latest_step(self.workdir)
    raise nan_debug.NumericalError(
      f"{updates} skipped, because the loss or a gradient is not finite: "
      f"{self._non_finite_cause(batch, state_before)}. "
      + (
        "No checkpoint was saved yet."
        if saved is None
        else f"The newest checkpoint in {self.workdir} is of update {saved}."
      )
    )

  def _non_finite_cause(self, batch: Batch, state_before: train_step_lib.TrainState | None) -> str:
    """Repeats the batch of the last skipped update; names the first non-finite tensor."""
    if jax.process_count() > 1:
      return "the first non-finite tensor can only be found in a run of a single process"
    if state_before is None:
      # Skipped updates change only `step`, and at most one batch has been trained on after them. So
      # the current state is the state before them, apart from `step` and the updates of that batch.
      n = self.train_cfg.updates_per_step
      step = (self.reporter.last_skipped - 1) // n * n
      state_before = self._train_state._replace(step=jnp.full_like(self._train_state.step, step))
    arguments = train_step_lib.replay_to_skipped(
      self.config, self.train_cfg, state_before, batch, self.checkpoint.rng
    )
    tensor = nan_debug.first_non_finite(config=self.config, **arguments) if arguments else None
    if tensor is None:
      return "not reproduced: the last skipped update is finite when it is run again"
    return f"the first non-finite tensor is the {tensor}"


def _n_batches(train_cfg: TrainConfig) -> int:
  """Returns the number of batches that make at least `n_update` updates."""
  return -(-train_cfg.n_update // train_cfg.updates_per_step)


def _is_validated(workdir: pathlib.Path, checkpoint: checkpoints.Checkpoint) -> bool:
  """Returns whether the validation of this checkpoint, or of a later one, is complete."""
  return best_checkpoint.read_validations(workdir).step >= int(checkpoint.train_state.step)
