"""Names for the types that appear in signatures throughout the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import chex
import haiku as hk
import jax
import numpy as np
import optax

Array = jax.Array  # an array on a device, or a tracer under jit
ArrayTree = chex.ArrayTree  # any nesting of containers with arrays as leaves
Batch = Mapping[str, Array]  # "inputs", "targets", "doc_ids", "loss_mask": [B, T] int32
HostBatch = dict[str, np.ndarray]  # the same in host memory, before it is put on devices
OptState = optax.OptState  # what the optimizer remembers, in its own containers
Params = hk.Params  # module path -> parameter name -> array; shapes may stand in for arrays


class StopRequest(Protocol):
  """A flag that a loop polls between two steps; a plain `bool` is one."""

  def __bool__(self) -> bool:
    """Returns whether the loop should stop."""
