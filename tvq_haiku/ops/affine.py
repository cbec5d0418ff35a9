"""Scaling and shifting of rows, with gradients that are matrix products.

Letters: D width, n rows.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.ops import matmul
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeat(vector: Array, n_row: int) -> Array:
  """Repeats a vector [D] as the rows of [n, D]."""
  return jnp.broadcast_to(vector, (n_row, *vector.shape))


def _repeat_forward(vector: Array, n_row: int) -> tuple[Array, None]:
  return _repeat(vector, n_row), None


def _repeat_backward(n_row: int, _: None, gradient: Array) -> tuple[Array]:
  ones = jnp.ones((1, n_row), gradient.dtype)
  return (matmul.project(ones, gradient, precision=matmul.EXACT)[0],)  # in,nd->id


_repeat.defvjp(_repeat_forward, _repeat_backward)
