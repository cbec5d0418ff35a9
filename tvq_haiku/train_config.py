"""Frozen, validated configuration of the training: optimizer, schedule and batch size."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from tvq_haiku.utils.settings import Settings, document_fields, setting

OPTIMIZERS = ("adamw", "lion", "adafactor")
LR_SCHEDULES = ("cosine", "linear", "inv_sqrt")


@document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
  """Optimizer, learning-rate schedule and batch size.

  Training makes `sequence_len / update_len` optimizer updates on each batch of
  `[global_batch_size, sequence_len]` tokens.

  >>> TrainConfig(sequence_len=512, update_len=128).updates_per_step
  4
  """

  optimizer: str = setting("adamw", "Optimizer: 'adamw', 'lion' or 'adafactor'.")
  lr_max: float = setting(4e-4, "Peak learning rate, reached at the end of the warm-up.")
  lr_schedule: str = setting(
    "cosine",
    "Decay after the warm-up: 'cosine' or 'linear' (to lr_max/10 at n_max_step), or 'inv_sqrt' "
    "(lr_max * sqrt(n_warmup_step / update), at least lr_max/10).",
  )
  n_warmup_step: int = setting(
    100, "Number of updates of linear warm-up from 0; must be less than n_max_step."
  )
  n_max_step: int = setting(1000, "Number of updates of the learning-rate schedule.")
  n_extra_step: int = setting(
    0,
    "Number of updates after n_max_step, at the last learning rate of the schedule. A run, even a "
    "finished one, continues if it is resumed with a larger number.",
  )
  grad_clip: float | None = setting(
    0.1, "Maximum global norm of all gradients except the codebooks'. None: no clipping."
  )
  wd_lam: float = setting(
    0.0, "Decoupled weight decay per update; not multiplied by the learning rate."
  )
  sequence_len: int = setting(512, "Tokens per batch element; a multiple of update_len.")
  update_len: int = setting(
    512, "Tokens per batch element and update: the length of truncated backpropagation."
  )
  global_batch_size: int = setting(8, "Batch size B over all devices and processes.")
  n_accumulate: int = setting(
    1,
    "Number of microbatches whose gradients are accumulated for an update, to save activation "
    "memory; must divide global_batch_size.",
  )

  def __post_init__(self):
    self._check_types()
    self._check_choice("optimizer", OPTIMIZERS)
    self._check_choice("lr_schedule", LR_SCHEDULES)
    self._check_minimum(0, "lr_max wd_lam n_warmup_step n_extra_step")
    self._check_minimum(1, "n_max_step sequence_len update_len global_batch_size n_accumulate")
    self._require(
      self.grad_clip is None or self.grad_clip > 0.0,
      "grad_clip",
      "must be positive, or None to disable clipping",
    )
    self._require(
      self.n_warmup_step < self.n_max_step,
      "n_warmup_step n_max_step",
      "n_warmup_step must be less than n_max_step",
    )
    self._require(
      self.sequence_len % self.update_len == 0,
      "sequence_len update_len",
      "update_len must divide sequence_len",
    )
    self._require(
      self.global_batch_size % self.n_accumulate == 0,
      "global_batch_size n_accumulate",
      "n_accumulate must divide global_batch_size",
    )

  @property
  def n_update(self) -> int:
    """Number of updates of the training run: n_max_step + n_extra_step."""
    return self.n_max_step + self.n_extra_step

  @property
  def updates_per_step(self) -> int:
    """Number of optimizer updates per batch."""
    return self.sequence_len // self.update_len

  @classmethod
  def enwik8(cls, **changes: Any) -> Self:
    """Returns the paper's training configuration for enwik8."""
    schedule = dict(lr_max=4e-4, n_warmup_step=10_000, n_max_step=125_000, wd_lam=2e-4)
    sizes = dict(sequence_len=8192, update_len=2048, global_batch_size=128)
    return cls(**(schedule | sizes | changes))

  @classmethod
  def pg19(cls, **changes: Any) -> Self:
    """Returns the paper's training configuration for PG-19."""
    rule = dict(optimizer="adafactor", lr_max=1e-2, grad_clip=None)
    steps = dict(n_warmup_step=10_000, n_max_step=500_000)
    sizes = dict(sequence_len=8192, update_len=2048, global_batch_size=128)
    return cls(**(rule | steps | sizes | changes))

  @classmethod
  def imagenet64(cls, **changes: Any) -> Self:
    """Returns the paper's training configuration for ImageNet64."""
    rule = dict(optimizer="adafactor", lr_max=1e-2, grad_clip=None)
    steps = dict(n_warmup_step=10_000, n_max_step=500_000)
    sizes = dict(sequence_len=12_288, update_len=1536, global_batch_size=128)
    return cls(**(rule | steps | sizes | changes))
