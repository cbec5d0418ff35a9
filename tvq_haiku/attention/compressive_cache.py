"""The compressive cache: counts and mean values of tokens that have left the window.

Letters: B batch, G key/value heads, R chunks (one for each block), n tokens of a chunk, S codes,
V value width.

The score of a query for a token that has left the window depends only on the token's code. So the
tokens of code s act like one token: with their count n_s and their mean value m_s, it has key C_s,
score scale · (q+u)·C_s + log n_s and value m_s. A chunk of tokens is summarized as (counts, means,
document). The summaries of two consecutive chunks merge by

  n = n_1 + n_2,    m = (n_1/n) m_1 + (n_2/n) m_2,

with n_1 = 0 if the second chunk ends in another document. Merging is associative, so the caches
before all blocks of a sequence are prefix sums, which can be computed in any grouping.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention import blocking
from tvq_haiku.ops import linear, matmul
from tvq_haiku.ops.scan import Scan
from tvq_haiku.types import Array

EMPTY = -1  # the code of a slot without a token
NO_DOCUMENT = -1  # the document of a slot or a summary without tokens
PREFIX_REDUCTIONS = ("serial", "matmul", "assoc_scan")


class Cache(NamedTuple):
  """R summaries of tokens; R is axis 2 of every field."""

  counts: Array  # [B, G, R, S] f32: number of tokens of each code
  means: Array  # [B, G, R, S, V] f32: their mean value; 0 where the count is 0
  doc_id: Array  # [B, 1, R] int32: the document of all of these tokens; NO_DOCUMENT without tokens


def summarize(codes: Array, values: Array, doc_ids: Array, n_code: int) -> Cache:
  """Summarizes R chunks of n tokens; each summary has only the tokens of its last document.

  Args:
    codes: [B, G, R, n] int32; EMPTY, in all heads of a batch element, where there is no token.
    values: [B, G, R, n, V].
    doc_ids: [B, 1, R, n] int32, not negative.
    n_code: S.

  Returns:
    R summaries.

  >>> codes, doc_ids = jnp.array([[[[0, 1, 1]]]]), jnp.zeros((1, 1, 1, 3), jnp.int32)
  >>> summarize(codes, jnp.array([[[[[5.0], [1.0], [2.0]]]]]), doc_ids, 2).means.squeeze().tolist()
  [5.0, 1.5]
  """
  B, _, R, n = codes.shape
  chex.assert_shape(doc_ids, (B, 1, R, n))
  chex.assert_shape(values, (*codes.shape, None))
  is_token = codes[:, :1] != EMPTY
  last = jnp.max(jnp.where(is_token, jnp.arange(n), -1), axis=-1, keepdims=True)
  last_doc = jnp.take_along_axis(doc_ids, jnp.maximum(last, 0), axis=-1)
  doc_id = jnp.where(last < 0, NO_DOCUMENT, last_doc)
  codes = jnp.where(doc_ids == doc_id, codes, EMPTY)
  counts = jnp.sum(jax.nn.one_hot(codes, n_code, dtype=jnp.float32), axis=-2)
  sums = sum_by_code(n_code, codes, values)
  return Cache(counts, sums / jnp.maximum(counts, 1.0)[..., None], doc_id[..., 0])


def plain_sum_by_code(n_code: int, codes: Array, values: Array) -> Array:
  """Computes what `sum_by_code` does, with automatic differentiation.

  Args:
    n_code: S.
    codes: [B, G, R, n] int32; EMPTY for no token.
    values: [B, G, R, n, V].
  """
  chex.assert_shape(values, (*codes.shape, None))
  is_code = jax.nn.one_hot(codes, n_code, dtype=values.dtype)
  # bgrns,bgrnv->bgrsv; TF32 would make the means inexact.
  return matmul.pool(is_code, values, preferred_element_type=jnp.float32, precision=matmul.EXACT)


def sum_by_code(n_code: int, codes: Array, values: Array) -> Array:
  """Sums the values of each code.

  Args:
    n_code: S.
    codes: [B, G, R, n] int32; EMPTY for no token.
    values: [B, G, R, n, V].

  Returns:
    [B, G, R, S, V] f32. The backward pass looks up the gradient of each value by its code. With a
    product with one-hot codes it took 1.3 times as long (2 CPU cores, S = 256, V = 512).
  """
  dtype = values.dtype
  return linear.linear_call(
    lambda codes, values: plain_sum_by_code(n_code, codes, values),
    lambda codes, sums: _look_up_sums(codes, sums).astype(dtype),
    codes,
    values,
  )


def _look_up_sums(codes: Array, sums: Array) -> Array:
  """Returns the row [B, G, R, n, V] of sums [B, G, R, S, V] for each code; zero for EMPTY."""
  index = jnp.maximum(codes, 0)[..., None]
  rows = jnp.take_along_axis(sums, index, axis=-2, mode="promise_in_bounds")
  return jnp.where((codes != EMPTY)[..., None], rows, 0.0)


def merge(left: Cache, right: Cache) -> Cache:
  """Merges the summaries of consecutive chunks."""
  doc_id = jnp.where(right.doc_id == NO_DOCUMENT, left.doc_id, right.doc_id)
  # Counts of discrete codes have no gradient; with the stop, none is computed either.
  continues = (left.doc_id == doc_id)[..., None]
  kept = jax.lax.stop_gradient(jnp.where(continues, left.counts, 0.0))
  added = jax.lax.stop_gradient(right.counts)
  counts = kept + added
  share = 1.0 / jnp.maximum(counts, 1.0)
  means = (kept * share)[..., None] * left.means + (added * share)[..., None] * right.means
  return Cache(counts, means, doc_id)


def prefixes(cache: Cache, chunks: Cache, reduction: str, *, scan: Scan = jax.lax.scan) -> Cache:
  """Merges `cache` with the first 0, 1, ..., R of the chunks.

  Args:
    cache: the summary of what precedes the chunks (R = 1).
    chunks: summaries of R consecutive chunks.
    reduction: `serial` merges one chunk after the other; `assoc_scan` merges pairs in about log2(R)
      rounds; `matmul` multiplies by a triangular matrix [R+1, R+1].
    scan: runs the loop of `serial`: `jax.lax.scan` or `hk.scan`.

  Returns:
    R + 1 caches.

  Raises:
    ValueError: `reduction` is not in `PREFIX_REDUCTIONS`.
  """
  if reduction not in PREFIX_REDUCTIONS:
    raise ValueError(f"prefixes: reduction={reduction!r} must be one of {PREFIX_REDUCTIONS}.")
  chex.assert_axis_dimension(cache.doc_id, 2, 1)
  if chunks.doc_id.shape[2] == 1:
    return blocking.concatenate(cache, merge(cache, chunks))
  if reduction == "serial":
    return blocking.concatenate(cache, _serial_prefixes(cache, chunks, scan))
  summaries = blocking.concatenate(cache, chunks)
  if reduction == "matmul":
    return _matmul_prefixes(summaries)
  return jax.lax.associative_scan(merge, summaries, axis=2)


def _serial_prefixes(cache: Cache, chunks: Cache, scan: Scan) -> Cache:
  """Returns `cache` merged with the first 1, ..., R chunks, one after the other."""

  def step(cache: Cache, chunk: Cache) -> tuple[Cache, Cache]:
    cache = merge(cache, jax.tree.map(lambda x: x[:, :, None], chunk))
    return cache, jax.tree.map(lambda x: x[:, :, 0], cache)

  chunks_first = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), chunks)
  _, merged = scan(step, cache, chunks_first)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), merged)


def _matmul_prefixes(summaries: Cache) -> Cache:
  """Returns all prefix merges by products with one triangular matrix A of zeros and ones.

  A_rj is 1 if prefix r contains summary j. The counts of prefix r are N_r = sum_j A_rj n_j, and its
  means are sum_j A_rj n_j m_j / N_r.
  """
  shape = (*summaries.counts.shape[:3], summaries.counts.shape[2])  # [B, G, R+1, R+1]
  index = jnp.arange(shape[-1])
  # The document of a prefix is that of its last summary with tokens.
  has_tokens = summaries.doc_id != NO_DOCUMENT
  last_nonempty = jax.lax.cummax(jnp.where(has_tokens, index, 0), axis=2)
  doc_id = jnp.take_along_axis(summaries.doc_id, last_nonempty, axis=2)
  # Prefix r contains summary j iff j <= r and no document begins after j, up to r.
  begins = jnp.concatenate(
    [jnp.zeros_like(doc_id[:, :, :1], bool), doc_id[:, :, 1:] != doc_id[:, :, :-1]], axis=2
  )
  n_begun = jnp.cumsum(begins, axis=2)
  contains = (n_begun[..., :, None] == n_begun[..., None, :]) & (index[:, None] >= index)
  contains = jnp.broadcast_to(contains.astype(jnp.float32), shape)
  counts = jax.lax.stop_gradient(summaries.counts)
  sums = (counts[..., None] * summaries.means).reshape(*shape[:3], -1)  # [B, G, R+1, S·V]
  counts = matmul.mix(contains, counts, precision=matmul.EXACT)  # bgrj,bgjs->bgrs
  sums = matmul.mix(contains, sums, precision=matmul.EXACT)  # bgrj,bgj(sv)->bgr(sv)
  means = sums.reshape(summaries.means.shape) / jnp.maximum(counts, 1.0)[..., None]
  return Cache(counts, means, doc_id)
