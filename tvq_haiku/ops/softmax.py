"""One softmax over several sets of keys, and its derivative.

Letters: A queries, n keys of a set, V value width; leading axes are batches.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp

from tvq_haiku.ops import matmul
from tvq_haiku.types import Array

_F32 = dict(preferred_element_type=jnp.float32)


@jax.custom_vjp
def softmax_mix(scores: Sequence[Array], values: Sequence[Array]) -> Array:
  """Values weighted by one softmax over all sets.

  Args:
    scores: [..., A, n] float32 for each set.
    values: [..., n, V] for each set.

  Returns:
    [..., A, V] in the dtype of the values.

  >>> attend([jnp.zeros((1, 2))], [jnp.array([[1.0], [2.0]])]).tolist()
  [[1.5]]
  """
  return _forward(scores, values)[0]


def softmax_weights(scores: Sequence[Array]) -> list[Array]:
  """The weights [..., n] f32 of one softmax over all sets."""
  greatest = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in scores])
  weights = [jnp.exp(x - greatest) for x in scores]
  total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
  return [x / total for x in weights]


def _forward(scores: Sequence[Array], values: Sequence[Array]):
  dtype = values[0].dtype
  weights = [x.astype(dtype) for x in softmax_weights(scores)]
  mixed = sum(matmul.mix(w, v, **_F32) for w, v in zip(weights, values)).astype(dtype)
  return mixed, (weights, list(values), mixed)


def _backward(residuals, gradient: Array):
  # d s = w (g·v - sum_j w_j g·v_j), and the sum over all keys is g·(the output): V products in
  # place of n, and no second pass over the weights.
  weights, values, mixed = residuals
  f32 = jnp.float32
  common = jnp.sum(gradient.astype(f32) * mixed.astype(f32), axis=-1, keepdims=True)
  d_scores = [w * (matmul.dots(gradient, v, **_F32) - common) for w, v in zip(weights, values)]
  d_values = [matmul.pool(w, gradient, **_F32).astype(v.dtype) for w, v in zip(weights, values)]
  return d_scores, d_values


softmax_mix.defvjp(_forward, _backward)
