"""What a training loop says of itself: a line of progress, and records."""

from __future__ import annotations

from collections.abc import Mapping
import math
import time
from typing import Any

import jax
import numpy as np

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.evaluation import flops
from tvq_haiku.run.metric_writers import RecordMetrics
from tvq_haiku.utils import progress


class Reporter:
  """Takes the metrics of every step, and reads them one step late: no device waits for it."""

  def __init__(
    self,
    config: TransformerConfig,
    train_cfg: TrainConfig,
    shown: progress.Progress,
    record: RecordMetrics | None,
    *,
    token_name: str,
    peak_flops: float | None,
    is_shown: bool = True,
  ):
    self._shown, self._record, self._token_name = shown, record, token_name
    self._is_shown = is_shown
    self._tokens_per_step = train_cfg.global_batch_size * train_cfg.sequence_len
    self._flops_per_token = flops.training_flops(config, train_cfg.sequence_len)
    self._peak = peak_flops
    self._pending: tuple[int, Any, bool] | None = None
    self.skipped = self.skipped_in_a_row = 0  # updates, since the start
    self.last_skipped: int | None = None  # its number, from 1
    self._average: float | None = None
    self._validated = ""
    self._rate: float | None = None  # tokens per second
    self._begin: float | None = None  # when the clock started
    self._steps = 0  # since then

  def step(self, update: int, metrics: Mapping[str, jax.Array], *, log: bool) -> None:
    """Takes what a step gave, and says what the one before it gave.

    Args:
      update: how many were made, this step's included.
      metrics: of the step, one value per update.
      log: whether to record it.
    """
    self.flush()
    self._pending = (update, metrics, log)
    if self._average is None:
      self._shown(update, "compiled")

  def flush(self) -> None:
    """Says what the last step gave, even if the device must be waited for."""
    if self._pending is None:
      return
    update, metrics, log = self._pending
    metrics = jax.device_get(metrics)
    self._pending = None
    self._count_skipped(update, metrics)
    for loss in metrics["loss_lm"][metrics["skipped"] == 0.0]:
      self._average = loss if self._average is None else 0.95 * self._average + 0.05 * loss
    self._tick()
    rate = "" if self._rate is None else f"  {self._rate:,.0f} tokens/s"
    bits = math.nan if self._average is None else self._average / math.log(2)
    skipped = f"  {self.skipped} updates skipped" if self.skipped else ""
    self._shown(update, f"{bits:.3f} bits per {self._token_name}{rate}{self._validated}{skipped}")
    if log and self._record:
      values = {name: float(np.mean(value)) for name, value in metrics.items()}
      values["skipped_since_start"] = self.skipped
      if self._rate is not None:
        values["tokens_per_second"] = self._rate
        if self._peak:
          values["of_peak"] = self._rate * self._flops_per_token / self._peak
      self._record(update, values)
      self.start_clock()  # speed is that since the last record

  def _count_skipped(self, update: int, metrics: Mapping[str, np.ndarray]) -> None:
    n = len(metrics["skipped"])
    for i in range(n):
      if not metrics["skipped"][i]:
        self.skipped_in_a_row = 0
        continue
      self.skipped += 1
      self.skipped_in_a_row += 1
      self.last_skipped = update - n + i + 1
      values = ", ".join(f"{name} {metrics[name][i]:.4g}" for name in ("loss", "grad_norm"))
      if self._is_shown:
        progress.log(f"warning: update {self.last_skipped} is skipped: {values}")

  def validation(self, update: int, found: Mapping[str, float]) -> None:
    """Says and records what validation found."""
    bits = found["loss_lm"] / math.log(2)
    self._validated = f"  validation {bits:.3f}"
    if self._record:
      self._record(update, {f"validation_{name}": value for name, value in found.items()})

  def start_clock(self) -> None:
    """What passed since the last step was not training, and does not count."""
    self._begin, self._steps = time.monotonic(), 0

  def _tick(self) -> None:
    if self._begin is None:  # the very first step pays for compilation
      self.start_clock()
      return
    self._steps += 1
    self._rate = self._steps * self._tokens_per_step / (time.monotonic() - self._begin)
