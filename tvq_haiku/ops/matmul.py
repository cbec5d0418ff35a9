"""Matrix products in the one form that compilers transpose for free.

An einsum over several batch or row axes is differentiated into products that contract over
several axes. XLA makes them fit by transposing whole operands, and fuses that with whatever
computed them, at a fraction of the speed of memory. Here leading axes are merged first, so that
every product and both of its gradients have one batch axis at most, and contract over one.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tvq_haiku.types import Array

EXACT = jax.lax.Precision.HIGHEST  # float32 that is not rounded to TF32 on the way


def _merged(x: Array) -> Array:
  return x.reshape(-1, *x.shape[-2:])


def project(x: Array, kernel: Array, **settings) -> Array:
  """[..., D] by [D, E] -> [..., E]; `settings` are those of `jnp.einsum`."""
  rows = jnp.einsum("nd,de->ne", x.reshape(-1, x.shape[-1]), kernel, **settings)
  return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def dots(x: Array, y: Array, **settings) -> Array:
  """[..., n, K] with [..., m, K] -> [..., n, m], the inner products of all pairs of rows."""
  return jnp.einsum("znk,zmk->znm", _merged(x), _merged(y), **settings).reshape(
    *x.shape[:-1], y.shape[-2]
  )


def mix(weights: Array, values: Array, **settings) -> Array:
  """[..., n, m] by [..., m, V] -> [..., n, V], weighted sums of rows."""
  return jnp.einsum("znm,zmv->znv", _merged(weights), _merged(values), **settings).reshape(
    *weights.shape[:-1], values.shape[-1]
  )


def pool(weights: Array, values: Array, **settings) -> Array:
  """[..., n, m] with [..., n, V] -> [..., m, V], sums over the n rows."""
  return jnp.einsum("znm,znv->zmv", _merged(weights), _merged(values), **settings).reshape(
    *weights.shape[:-2], weights.shape[-1], values.shape[-1]
  )


def dots_per_head(x: Array, y: Array, **settings) -> Array:
  """[B, G, ..., n, K] with [G, m, K] -> [B, G, ..., n, m]: `y` is that of the head."""
  if y.shape[0] == 1:
    return project(x, y[0].T, **settings)
  y = y.reshape(y.shape[0], *(1,) * (x.ndim - 4), *y.shape[1:])
  return dots(x, jnp.broadcast_to(y, (*x.shape[:-2], *y.shape[-2:])), **settings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat_rows(vector: Array, n_row: int) -> Array:
  """[D] -> [n, D]; the gradient, a sum of columns, is a product with ones, which is faster."""
  return jnp.broadcast_to(vector, (n_row, *vector.shape))


repeat_rows.defvjp(
  lambda vector, n_row: (repeat_rows(vector, n_row), None),
  lambda n_row, _, gradient: (
    project(jnp.ones((1, n_row), gradient.dtype), gradient, precision=EXACT)[0],
  ),
)
