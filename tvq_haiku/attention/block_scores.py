"""Attention of blocks: one softmax over the tokens of a window and the codes of caches.

Letters: B batch, G key/value heads, R blocks, P query heads for each key/value head, L block
length, n keys, M memory length, D relative keys, S codes, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention.compressive_cache import EMPTY, Cache
from tvq_haiku.attention.key_values import KeyValues
from tvq_haiku.ops import matmul, positions, softmax
from tvq_haiku.ops.softmax import MASKED
from tvq_haiku.types import Array

_F32 = dict(preferred_element_type=jnp.float32)


class Queries(NamedTuple):
  """Queries of R blocks, scaled, with their biases added."""

  content: Array  # [B, G, R, P, L, K] scale · (q + u)
  position: Array  # [B, G, R, P, L, K] scale · (q + w)


class SharedKeys(NamedTuple):
  """Keys that are the same for every block."""

  codebook: Array  # [G, S, K] f32
  relative: Array | None  # [G, M+1, K] r_M, ..., r_0; for an encoder [G, 2M+1, K] r_M, ..., r_-M


def attend_blocks(
  queries: Queries,
  doc_ids: Array,
  window: Sequence[KeyValues],
  caches: Sequence[Cache],
  shared: SharedKeys,
  *,
  is_causal: bool,
  agg_cache: bool,
) -> Array:
  """Computes the attention of R blocks, each over its window and its caches.

  Args:
    queries: of R blocks.
    doc_ids: [B, 1, R, L] int32: document of each query.
    window: the tokens that a block attends one by one, in reading order: the M tokens before it,
      its own L tokens and, for an encoder, the M tokens after it.
    caches: R caches of what precedes each window; for an encoder, also R of what follows it.
    shared: codebook and relative keys.
    is_causal: True masks tokens after the query.
    agg_cache: False masks the caches, and tokens farther than M from the query.

  Returns:
    [B, G, R, P, L, V].
  """
  M, L = window[0].doc_ids.shape[-1], doc_ids.shape[-1]
  chex.assert_rank((queries.content, doc_ids), (6, 4))
  bias = None if shared.relative is None else relative_bias(queries.position, shared.relative)
  scores, values = [], []
  start = -M  # index of the first key of a part; the first token of the block has index 0
  for part in window:
    n = part.doc_ids.shape[-1]
    visible = _is_visible(doc_ids, part, start, M, is_causal=is_causal, agg_cache=agg_cache)
    part_bias = None if bias is None else bias[..., start + M : start + M + n]
    scores.append(window_scores(queries.content, part.keys, part_bias, visible))
    values.append(part.values)
    start += n
  if agg_cache:
    code_scores = matmul.dots_per_head(  # bgrplk,gsk->bgrpls
      queries.content, shared.codebook.astype(queries.content.dtype), **_F32
    )
    for cache in caches:
      scores.append(cache_scores(code_scores, cache, doc_ids))
      values.append(cache.means.astype(values[0].dtype))
  chex.assert_axis_dimension(scores[0], -2, L)
  return softmax.softmax_mix(scores, values)


def relative_bias(queries: Array, relative_keys: Array) -> Array:
  """Computes scale · (q_i + w)·r_{i-j} for each key j of the window; zero where it has no r_{i-j}.

  Args:
    queries: [B, G, R, P, L, K] scale · (q + w).
    relative_keys: [G, D, K] in the order of the keys: r_M first.

  Returns:
    [B, G, R, P, L, D-1+L] f32.
  """
  chex.assert_rank((queries, relative_keys), (6, 3))
  by_distance = matmul.dots_per_head(queries, relative_keys, **_F32)  # bgrplk,gdk->bgrpld
  return positions.align_distances(by_distance, queries.shape[-2])


def window_scores(queries: Array, keys: Array, bias: Array | None, visible: Array) -> Array:
  """Computes scale · (q_i + u)·k̂_j plus the relative bias, masked.

  Args:
    queries: [B, G, R, P, L, K] scale · (q + u).
    keys: [B, G, R, n, K].
    bias: [B, G, R, P, L, n] f32, or None.
    visible: [B, 1, R, 1, L, n] bool.

  Returns:
    [B, G, R, P, L, n] f32.
  """
  (B, _, R, _, L, _), n = queries.shape, keys.shape[-2]
  chex.assert_shape(visible, (B, 1, R, 1, L, n))
  scores = matmul.dots(queries, keys.astype(queries.dtype), **_F32)  # bgrplk,bgrnk->bgrpln
  return jnp.where(visible, scores if bias is None else scores + bias, MASKED)


def cache_scores(code_scores: Array, cache: Cache, doc_ids: Array) -> Array:
  """Computes scale · (q_i + u)·C_s + log n_s, masked where n_s = 0 or the document differs.

  Args:
    code_scores: [B, G, R, P, L, S] f32 scale · (q_i + u)·C_s.
    cache: R caches.
    doc_ids: [B, 1, R, L] int32: document of each query.

  Returns:
    [B, G, R, P, L, S] f32.
  """
  B, G, R, _, L, S = code_scores.shape
  chex.assert_shape((cache.counts, doc_ids), [(B, G, R, S), (B, 1, R, L)])
  counts = jax.lax.stop_gradient(cache.counts)[:, :, :, None, None]
  same_doc = (doc_ids == cache.doc_id[..., None])[:, :, :, None, :, None]
  scores = code_scores + jnp.log(jnp.maximum(counts, 1.0))
  return jnp.where((counts > 0.0) & same_doc, scores, MASKED)


def _is_visible(
  doc_ids: Array, keys: KeyValues, start: int, mem_len: int, *, is_causal: bool, agg_cache: bool
) -> Array:
  """Returns which keys each query may attend: [B, 1, R, 1, L, n] bool.

  Args:
    doc_ids: [B, 1, R, L] int32: document of each query.
    keys: of R blocks, n for each.
    start: index of the first key, counted from the first token of the block.
    mem_len: M.
    is_causal: True: keys after the query are not visible.
    agg_cache: False: keys farther than M from the query are not visible.
  """
  L, n = doc_ids.shape[-1], keys.doc_ids.shape[-1]
  query, key = jnp.arange(L)[:, None], start + jnp.arange(n)
  # A slot without a token is EMPTY in all heads, so the first head tells.
  has_token = (keys.codes[:, :1] != EMPTY)[..., None, :]
  visible = (doc_ids[..., None] == keys.doc_ids[..., None, :]) & has_token
  if is_causal:
    visible &= query >= key
  if not agg_cache:
    visible &= jnp.abs(query - key) <= mem_len
  return visible[:, :, :, None]
