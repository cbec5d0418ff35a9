"""Options of the training loop."""

from __future__ import annotations

import dataclasses
import numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerOptions:
  """Options for saving, logging and validating; the trained parameters don't depend on them.

  >>> TrainerOptions(log_every=0)
  Traceback (most recent call last):
  ValueError: TrainerOptions: log_every=0 must be an integer of at least 1.
  """

  save_seconds: float = 60.0  # seconds between two checkpoints; 0: one after every batch
  max_to_keep: int = 2  # number of most recent checkpoints to keep
  log_every: int = 10  # updates between two records of metrics
  validate_every: int = 1000  # updates between two validations; the last update is followed by one
  max_skipped: int = 20  # consecutive skipped updates that end the run
  debug_nans: bool = False  # end the run at the first skipped update; needs a copy of the state
  token_name: str = "token"  # unit of the loss in the progress line, such as "byte"

  def __post_init__(self):
    for name in ("max_to_keep", "log_every", "validate_every", "max_skipped"):
      value = getattr(self, name)
      if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"TrainerOptions: {name}={value!r} must be an integer of at least 1.")
    if not self.save_seconds >= 0:  # NaN is refused, too
      raise ValueError(
        f"TrainerOptions: save_seconds={self.save_seconds!r} must be at least 0 seconds."
      )
