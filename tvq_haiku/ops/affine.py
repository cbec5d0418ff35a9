"""Scaling and shifting of rows, with gradients that are matrix products.

Letters: D width, n rows.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from tvq_haiku.ops import linear, matmul
from tvq_haiku.types import Array


def plain_scale_and_shift(x: Array, gain: Array, offset: Array) -> Array:
  """Computes what `scale_and_shift` does, with automatic differentiation.

  Args:
    x: [..., D].
    gain: [D].
    offset: [D].
  """
  chex.assert_equal_shape((gain, offset))
  return x * gain + offset


def scale_and_shift(x: Array, gain: Array, offset: Array) -> Array:
  """Computes x * gain + offset.

  The gradients of gain and offset are sums over all rows, computed as products with a row of ones.

  Args:
    x: [..., D].
    gain: [D].
    offset: [D].

  Returns:
    [..., D].
  """
  chex.assert_equal_shape((gain, offset))
  chex.assert_equal_shape_suffix((x, gain), 1)
  n_row = x.size // x.shape[-1]
  gain, offset = (_repeat(vector, n_row).reshape(x.shape) for vector in (gain, offset))
  return x * gain + offset


def _repeat(vector: Array, n_row: int) -> Array:
  """Repeats a vector [D] as the rows of [n, D]."""

  def repeat(_: tuple[()], vector: Array) -> Array:
    return jnp.broadcast_to(vector, (n_row, *vector.shape))

  return linear.linear_call(repeat, _sum_rows, (), vector)


def _sum_rows(_: tuple[()], rows: Array) -> Array:
  """Sums rows [n, D] to a vector [D]: the transpose of `_repeat`."""
  ones = jnp.ones((1, rows.shape[0]), rows.dtype)
  return matmul.project(ones, rows, precision=matmul.EXACT)[0]  # in,nd->id
