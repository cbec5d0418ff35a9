"""What is kept of tokens that have left the window: how many had each code, and their mean value.

Letters: B batch, G key/value heads, R blocks, n tokens of a chunk, S codes, V value width.

A chunk of tokens is summarised as (counts, means, document). Merging two neighbours by
  n = n_1 + n_2,    m = (n_1/n) m_1 + (n_2/n) m_2,
where the left one counts only if both end in the same document, is associative. So the caches
that the blocks of a sequence meet are prefix "sums", and can be computed in any grouping.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.ops import matmul
from tvq_haiku.types import Array

NO_DOCUMENT = -1  # of a summary without tokens


class Cache(NamedTuple):
  """R summaries of tokens; R is axis 2 of every field."""

  counts: Array  # [B, G, R, S] f32
  means: Array  # [B, G, R, S, V] f32
  doc: Array  # [B, 1, R] int32: the document that all of its tokens belong to


def summarize(codes: Array, values: Array, docs: Array, n_code: int) -> Cache:
  """Summaries of R chunks of n tokens, each of the tokens of its last document.

  Args:
    codes: [B, G, R, n] int32: `n_code` where there is no token.
    values: [B, G, R, n, V].
    docs: [B, 1, R, n] int32, not negative.
    n_code: S.

  >>> codes, docs = jnp.array([[[[0, 1, 1]]]]), jnp.zeros((1, 1, 1, 3), jnp.int32)
  >>> summarize(codes, jnp.array([[[[[5.0], [1.0], [2.0]]]]]), docs, 2).means.squeeze().tolist()
  [5.0, 1.5]
  """
  is_token = codes[:, :1] < n_code  # all heads agree
  place = jnp.where(is_token, jnp.arange(docs.shape[-1]), -1)
  last = jnp.max(place, axis=-1, keepdims=True)
  doc = jnp.where(last < 0, NO_DOCUMENT, jnp.take_along_axis(docs, jnp.maximum(last, 0), axis=-1))
  codes = jnp.where(docs == doc, codes, n_code)
  counts = jnp.sum(jax.nn.one_hot(codes, n_code, dtype=jnp.float32), axis=-2)
  sums = _sum_by_code(n_code, codes, values)
  return Cache(counts, sums / jnp.maximum(counts, 1.0)[..., None], doc[..., 0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_by_code(n_code: int, codes: Array, values: Array) -> Array:
  """The sum [B, G, R, S, V] f32 of the values of each code."""
  is_code = jax.nn.one_hot(codes, n_code, dtype=values.dtype)
  return matmul.pool(
    is_code, values, preferred_element_type=jnp.float32, precision=matmul.EXACT
  )  # or TF32 would wear the means down


def _sum_by_code_fwd(n_code: int, codes: Array, values: Array):
  return _sum_by_code(n_code, codes, values), (codes, values[:0])


def _sum_by_code_bwd(n_code: int, residuals: tuple[Array, Array], gradient: Array):
  # A token has one code: looking its row up is cheaper than the transposed product.
  codes, like = residuals
  index = jnp.minimum(codes, n_code - 1)[..., None]
  rows = jnp.take_along_axis(gradient, index, axis=-2, mode="promise_in_bounds")
  return None, jnp.where((codes < n_code)[..., None], rows, 0.0).astype(like.dtype)


_sum_by_code.defvjp(_sum_by_code_fwd, _sum_by_code_bwd)


def merge(left: Cache, right: Cache) -> Cache:
  """The summaries of left and right together, which follow each other in the text."""
  doc = jnp.where(right.doc == NO_DOCUMENT, left.doc, right.doc)
  # Counts are of discrete codes: no gradient, and none of the work of computing one.
  kept = jax.lax.stop_gradient(jnp.where((left.doc == doc)[..., None], left.counts, 0.0))
  added = jax.lax.stop_gradient(right.counts)
  counts = kept + added
  share = 1.0 / jnp.maximum(counts, 1.0)
  means = (kept * share)[..., None] * left.means + (added * share)[..., None] * right.means
  return Cache(counts, means, doc)


def prefixes(cache: Cache, chunks: Cache, reduction: str) -> Cache:
  """R+1 caches: `cache` (of R = 1), and it merged with the first 1, 2, ..., R chunks.

  Args:
    cache: what came before.
    chunks: R summaries in the order of the text.
    reduction: `serial` merges one by one; `assoc_scan` in log2(R) rounds of pairs; `matmul` by
      one product with a triangular matrix [R+1, R+1].
  """
  if reduction not in ("serial", "matmul", "assoc_scan"):
    raise ValueError(f"prefixes: reduction={reduction!r} must be serial, matmul or assoc_scan.")
  if chunks.doc.shape[2] == 1:
    return _concat(cache, merge(cache, chunks))
  if reduction == "serial":
    return _concat(cache, _serial(cache, chunks))
  every = _concat(cache, chunks)
  if reduction == "matmul":
    return _matmul(every)
  return jax.lax.associative_scan(merge, every, axis=2)


def _concat(left: Cache, right: Cache) -> Cache:
  return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=2), left, right)


def _serial(cache: Cache, chunks: Cache) -> Cache:

  def step(cache: Cache, chunk: Cache) -> tuple[Cache, Cache]:
    cache = merge(cache, jax.tree.map(lambda x: x[:, :, None], chunk))
    return cache, jax.tree.map(lambda x: x[:, :, 0], cache)

  _, after = jax.lax.scan(step, cache, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), chunks))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), after)


def _matmul(every: Cache) -> Cache:
  R = every.doc.shape[2]
  here = jnp.arange(R)
  filled = jax.lax.cummax(jnp.where(every.doc == NO_DOCUMENT, 0, here), axis=2)
  doc = jnp.take_along_axis(every.doc, filled, axis=2)
  changes = jnp.cumsum(doc != jnp.roll(doc, 1, axis=2).at[:, :, 0].set(doc[:, :, 0]), axis=2)
  keeps = (changes[..., :, None] == changes[..., None, :]) & (here[:, None] >= here)  # [B, 1, R, R]
  keeps = jnp.broadcast_to(keeps.astype(jnp.float32), (*every.counts.shape[:3], R))
  numbers = jax.lax.stop_gradient(every.counts)
  counts = matmul.mix(keeps, numbers, precision=matmul.EXACT)
  sums = (numbers[..., None] * every.means).reshape(*every.counts.shape[:3], -1)
  sums = matmul.mix(keeps, sums, precision=matmul.EXACT).reshape(every.means.shape)
  return Cache(counts, sums / jnp.maximum(counts, 1.0)[..., None], doc)
