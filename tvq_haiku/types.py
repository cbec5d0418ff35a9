"""Names for the types that appear in signatures throughout the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeVar

import chex
import haiku as hk
import jax
import numpy as np
import optax

Array = jax.Array  # an array on a device, or a tracer under jit
ArrayTree = chex.ArrayTree  # arrays in nested containers
# "inputs", "targets", "doc_ids", "loss_mask": [B, T] int32; features as "inputs": [B, T, D] f32
Batch = Mapping[str, Array]
HostBatch = dict[str, np.ndarray]  # the same in host memory, before it is copied to devices
OptState = optax.OptState  # state of the optimizer, in the containers of optax
# Nested containers; a function from Tree to Tree returns the same containers as it takes.
Tree = TypeVar("Tree")
Params = hk.Params  # module path -> parameter name -> array, or `jax.ShapeDtypeStruct`


class StopRequest(Protocol):
  """A flag that a loop polls between two steps; a plain `bool` is one."""

  def __bool__(self) -> bool:
    """Returns whether the loop should stop."""
