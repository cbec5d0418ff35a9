"""The options of the training loop are checked when they are created."""

import math

import numpy as np
import pytest

from tvq_haiku.run.trainer_options import TrainerOptions


@pytest.mark.parametrize("name", ["max_to_keep", "log_every", "validate_every", "max_skipped"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None])
def test_counts_must_be_positive_integers(name, value):
  message = rf"TrainerOptions: {name}={value!r} must be an integer of at least 1\."
  with pytest.raises(ValueError, match=message):
    TrainerOptions(**{name: value})


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_time_between_checkpoints_must_not_be_negative(value):
  with pytest.raises(ValueError, match=f"save_seconds={value!r} must be at least 0 seconds"):
    TrainerOptions(save_seconds=value)


def test_extreme_values_are_accepted():
  options = TrainerOptions(save_seconds=0.0, log_every=1, max_to_keep=np.int64(1))
  assert options.log_every == 1
  assert TrainerOptions(save_seconds=math.inf).save_seconds == math.inf
