"""Reports of a training run: the progress line, warnings about skipped updates, and metrics."""

from __future__ import annotations

from collections.abc import Mapping
import math
import time
from typing import NamedTuple

import chex
import jax
import numpy as np

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.evaluation import flops
from tvq_haiku.parallel import multihost
from tvq_haiku.run import measures
from tvq_haiku.run.metric_writers import RecordMetrics
from tvq_haiku.run.trainer_options import TrainerOptions
from tvq_haiku.types import Array
from tvq_haiku.utils import progress


class Reporter:
  """Reports the metrics of each batch one batch late, so that no device waits for the host.

  Attributes:
    skipped: number of updates skipped since the process started.
    skipped_in_a_row: number of consecutive skipped updates up to and including the last reported
      update; 0 if that one was not skipped.
    last_skipped: number of the last skipped update, counted from 1; None if there is none.
  """

  def __init__(
    self,
    config: TransformerConfig,
    train_cfg: TrainConfig,
    options: TrainerOptions,
    show_progress: progress.Progress,
    record: RecordMetrics | None,
  ):
    """Creates a reporter that has reported nothing yet.

    Args:
      config: configuration of the model.
      train_cfg: configuration of its training.
      options: options of the training loop, for the unit of the loss.
      show_progress: shows the progress line.
      record: writes metrics; None: metrics are not written.
    """
    self.skipped = self.skipped_in_a_row = 0
    self.last_skipped: int | None = None
    self._options, self._show_progress, self._record = options, show_progress, record
    self._flops_per_token = flops.training_flops(config, train_cfg.sequence_len)
    self._speed = _SpeedMeter(train_cfg.global_batch_size * train_cfg.sequence_len)
    self._pending: _BatchMetrics | None = None
    self._average_loss: float | None = None  # nats per token; exponential moving average
    self._validation_note = ""

  def report_batch(self, update: int, metrics: Mapping[str, Array], *, record: bool) -> None:
    """Stores the metrics of a batch, and reports those of the previous batch.

    Args:
      update: number of updates made so far, including those of this batch.
      metrics: [T/update_len] f32 each: one value per update of the batch.
      record: whether to write these metrics; the progress line is shown in any case.
    """
    chex.assert_rank(list(metrics.values()), 1)
    chex.assert_equal_shape(list(metrics.values()))
    self.flush()
    self._pending = _BatchMetrics(update, metrics, record)
    if self._average_loss is None:
      self._show_progress(update, "compiled")

  def flush(self) -> None:
    """Reports the metrics of the last batch; waits until the devices have computed them."""
    if self._pending is None:
      return
    update, metrics, record = self._pending
    metrics = jax.device_get(metrics)
    self._pending = None
    self._count_skipped(update, metrics)
    self._update_average_loss(metrics)
    self._speed.count_batch()
    self._show_progress(update, self._progress_note())
    if record and self._record:
      self._record(update, self._batch_record(metrics))
      self.restart_clock()  # speed is measured from one record to the next

  def report_validation(self, update: int, metrics: Mapping[str, float]) -> None:
    """Writes the metrics of a validation, and shows the main one in the progress line from then on.

    Args:
      update: number of updates made so far.
      metrics: metrics of the validation split, with `loss_lm` in nats per token.
    """
    self._validation_note = f"  validation {measures.describe(metrics, self._options.token_name)}"
    if self._record:
      self._record(update, {f"validation_{name}": value for name, value in metrics.items()})

  def restart_clock(self) -> None:
    """Restarts the measurement of speed, which then excludes the time since the last batch."""
    self._speed.restart()

  def _count_skipped(self, update: int, metrics: Mapping[str, np.ndarray]) -> None:
    n_updates = len(metrics["skipped"])
    for i, is_skipped in enumerate(metrics["skipped"]):
      if not is_skipped:
        self.skipped_in_a_row = 0
        continue
      self.skipped += 1
      self.skipped_in_a_row += 1
      self.last_skipped = update - n_updates + i + 1
      if multihost.is_main_process():
        values = ", ".join(f"{name} {metrics[name][i]:.4g}" for name in ("loss", "grad_norm"))
        progress.log(f"warning: update {self.last_skipped} is skipped: {values}")

  def _update_average_loss(self, metrics: Mapping[str, np.ndarray]) -> None:
    for loss in metrics["loss_lm"][metrics["skipped"] == 0.0]:
      if self._average_loss is None:
        self._average_loss = loss
      else:
        self._average_loss = 0.95 * self._average_loss + 0.05 * loss

  def _progress_note(self) -> str:
    rate = self._speed.tokens_per_second
    speed = "" if rate is None else f"  {rate:,.0f} tokens/s"
    bits = math.nan if self._average_loss is None else self._average_loss / math.log(2)
    skipped = f"  {self.skipped} updates skipped" if self.skipped else ""
    return f"{bits:.3f} bits per {self._options.token_name}{speed}{self._validation_note}{skipped}"

  def _batch_record(self, metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns the means over the updates of a batch, the skipped updates so far, and the speed."""
    record = {name: float(np.mean(values)) for name, values in metrics.items()}
    record["skipped_since_start"] = self.skipped
    rate = self._speed.tokens_per_second
    if rate is not None:
      record["tokens_per_second"] = rate
      # Not as a fraction of the peak speed: that would have to be measured in alternation with
      # training, as in `experiments/benchmarks`, because the speed of a machine varies.
      record["flops_per_second"] = rate * self._flops_per_token
    return record


class _BatchMetrics(NamedTuple):
  """Metrics of a batch that are not reported yet."""

  update: int  # number of updates made, including the batch's
  metrics: Mapping[str, Array]  # [T/update_len] f32 each
  record: bool  # whether to write them


class _SpeedMeter:
  """Measures the tokens per second of training, without the first batch, which compiles."""

  def __init__(self, tokens_per_batch: int):
    self.tokens_per_second: float | None = None  # None until the second batch
    self._tokens_per_batch = tokens_per_batch
    self._start: float | None = None  # seconds on the monotonic clock
    self._batches = 0  # since the start

  def restart(self) -> None:
    """Starts a new measurement."""
    self._start, self._batches = time.monotonic(), 0

  def count_batch(self) -> None:
    """Counts a batch that has just ended."""
    if self._start is None:
      self.restart()
      return
    self._batches += 1
    self.tokens_per_second = (
      self._batches * self._tokens_per_batch / (time.monotonic() - self._start)
    )
