"""Batched matrix products with a single batch axis, whose gradients need no layout transposes.

XLA differentiates an einsum over several batch axes into products that contract over several axes,
and makes them fit by transposing whole operands, at a fraction of the speed of memory. The
functions here merge leading axes first. So every product, and both of its gradients, has at most
one batch axis and contracts over one axis. The plain form of each is the einsum in its docstring.

The rows of the first operand may have several axes: of [*batch, *rows, K] and [*batch, m, K], the
batch axes are those that both have.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.types import Array

EXACT = jax.lax.Precision.HIGHEST  # float32 products that are not rounded to TF32


def project(x: Array, kernel: Array, **settings: Any) -> Array:
  """Multiplies the last axis by a matrix: "...d,de->...e".

  Args:
    x: [..., D].
    kernel: [D, E].
    **settings: of `jnp.einsum`.

  Returns:
    [..., E].
  """
  chex.assert_axis_dimension(kernel, 0, x.shape[-1])
  rows = jnp.einsum("nd,de->ne", x.reshape(-1, x.shape[-1]), kernel, **settings)
  return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def dots(x: Array, y: Array, **settings: Any) -> Array:
  """Computes the dot products of all rows of `x` with all rows of `y`: "znk,zmk->znm".

  Args:
    x: [*batch, *rows, K].
    y: [*batch, m, K].
    **settings: of `jnp.einsum`.

  Returns:
    [*batch, *rows, m].

  >>> dots(jnp.ones((2, 3, 4, 8)), jnp.ones((2, 5, 8))).shape
  (2, 3, 4, 5)
  """
  n_batch = y.ndim - 2
  chex.assert_equal_shape_prefix((x, y), n_batch)
  products = jnp.einsum("znk,zmk->znm", _merged(x, n_batch), _merged(y, n_batch), **settings)
  return products.reshape(*x.shape[:-1], y.shape[-2])


def dots_per_head(x: Array, y: Array, **settings: Any) -> Array:
  """As `dots`, with rows `y` that depend on the head alone: "bgnk,gmk->bgnm".

  Args:
    x: [B, G, *rows, K].
    y: [G, m, K].
    **settings: of `jnp.einsum`.

  Returns:
    [B, G, *rows, m].
  """
  chex.assert_axis_dimension(x, 1, y.shape[0])
  if y.shape[0] == 1:
    return project(x, y[0].T, **settings)
  return dots(x, jnp.broadcast_to(y, (x.shape[0], *y.shape)), **settings)


def mix(weights: Array, values: Array, **settings: Any) -> Array:
  """Computes weighted sums of the rows of `values`: "znm,zmv->znv".

  Args:
    weights: [*batch, *rows, m].
    values: [*batch, m, V].
    **settings: of `jnp.einsum`.

  Returns:
    [*batch, *rows, V].
  """
  n_batch = values.ndim - 2
  chex.assert_equal_shape_prefix((weights, values), n_batch)
  sums = jnp.einsum("znm,zmv->znv", _merged(weights, n_batch), _merged(values, n_batch), **settings)
  return sums.reshape(*weights.shape[:-1], values.shape[-1])


def pool(weights: Array, values: Array, *, n_batch: int | None = None, **settings: Any) -> Array:
  """Computes a weighted sum over all rows for each column of `weights`: "znm,znv->zmv".

  It is the gradient of `mix` with respect to its values.

  Args:
    weights: [*batch, *rows, m].
    values: [*batch, *rows, V].
    n_batch: number of batch axes. None: all but the last two.
    **settings: of `jnp.einsum`.

  Returns:
    [*batch, m, V].
  """
  n_batch = weights.ndim - 2 if n_batch is None else n_batch
  chex.assert_equal_shape_prefix((weights, values), weights.ndim - 1)
  sums = jnp.einsum("znm,znv->zmv", _merged(weights, n_batch), _merged(values, n_batch), **settings)
  return sums.reshape(*weights.shape[:n_batch], weights.shape[-1], values.shape[-1])


def _merged(x: Array, n_batch: int) -> Array:
  """Returns [batch, rows, K]: the first `n_batch` axes as one, and all rows as one."""
  return x.reshape(math.prod(x.shape[:n_batch]), -1, x.shape[-1])
