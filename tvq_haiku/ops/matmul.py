"""Batched matrix products with a single batch axis, whose gradients need no layout transposes.

The gradients of an einsum with several batch or row axes are products that contract over several
axes. XLA transposes complete operands to compute them: with plain einsums, a training step took 1.2
to 1.3 times as long (2 CPU cores, 2,048 tokens, D = 256). The functions here merge leading axes
first. So every product, and both of its gradients, has at most
one batch axis and contracts over one axis. The docstring of each function has the einsum that it
computes, in which z stands for all batch axes, and n for all row axes.

The rows of the first operand may have several axes. Of [*batch, *rows, K] and [*batch, m, K], the
leading axes that both have are batch axes.
"""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.types import Array

EXACT = jax.lax.Precision.HIGHEST  # float32 products without rounding to TF32 or bfloat16


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
  """Computes `dots` with rows `y` that are the same for the complete batch: "bgnk,gmk->bgnm".

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
  """Computes, for each column of `weights`, a weighted sum of all rows: "znm,znv->zmv".

  This is the gradient of `mix` with respect to its values.

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
  """Reshapes [*batch, *rows, K], with `n_batch` batch axes, to three axes."""
  return x.reshape(math.prod(x.shape[:n_batch]), -1, x.shape[-1])
