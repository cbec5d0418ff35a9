"""What a block of queries attends: its window token by token, all else through caches.

Letters: B batch, R blocks, L block length, M memory length, G key/value heads, P query heads a
group, A = P·L rows of queries, S codes, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.attention.blocking import KeyValues
from tvq_haiku.attention.compressive_cache import Cache
from tvq_haiku.ops import matmul, positions, softmax
from tvq_haiku.types import Array

MASKED = -1e30  # finite, so that a fully masked row stays free of NaN


class Queries(NamedTuple):
  """Queries by block, those of the P heads of a group behind each other: A = P·L rows."""

  content: Array  # [B, G, R, A, K] q + u
  position: Array  # [B, G, R, A, K] q + v


class SharedKeys(NamedTuple):
  """What queries of every block meet."""

  codebook: Array  # [G, S, K] f32
  relative: Array | None  # [G, M+1, K], of distances M, ..., 0; [G, 2M+1, K] on to -M


def attend(
  queries: Queries,
  tokens: Sequence[KeyValues],
  past: Sequence[Cache],
  keys: SharedKeys,
  *,
  agg_cache: bool,
) -> Array:
  """Values [B, G, R, A, V] for the queries of R blocks.

  Args:
    queries: of tokens[1].
    tokens: what they attend one by one: the M tokens before a block, the block itself, and, for
      an encoder, the M tokens after it.
    past: the caches of what is farther away, on either side.
    keys: of codes and distances.
    agg_cache: False: the caches, and tokens farther away than M, are not attended.
  """
  M, L = (x.docs.shape[-1] for x in tokens[:2])
  S, n_row = keys.codebook.shape[1], queries.content.shape[3]
  dtype = queries.content.dtype
  docs = jnp.tile(tokens[1].docs, n_row // L)[..., None]  # [B, 1, R, A, 1]
  here = jnp.tile(jnp.arange(L), n_row // L)[:, None]
  bias = None
  if keys.relative is not None:
    bias = matmul.dots_per_head(queries.position, keys.relative, preferred_element_type=jnp.float32)
    by_head = bias.reshape(*bias.shape[:3], -1, L, bias.shape[-1])
    bias = positions.align_distances(by_head, L).reshape(*bias.shape[:-1], -1)
  scores, values, start = [], [], -M
  for part in tokens:
    place = start + jnp.arange(part.docs.shape[-1])
    score = matmul.dots(
      queries.content, part.keys.astype(dtype), preferred_element_type=jnp.float32
    )
    if bias is not None:
      score += bias[..., start + M : start + M + place.size]
    visible = (docs == part.docs[..., None, :]) & (part.codes[:, :1, :, None] < S)
    if len(tokens) == 2:
      visible &= here >= place
    if not agg_cache:
      visible &= jnp.abs(here - place) <= M
    scores.append(jnp.where(visible, score, MASKED))
    values.append(part.values)
    start += place.size
  if agg_cache:
    score = matmul.dots_per_head(
      queries.content, keys.codebook.astype(dtype), preferred_element_type=jnp.float32
    )
    for cache in past:
      counts = jax.lax.stop_gradient(cache.counts)[..., None, :]
      visible = (counts > 0.0) & (docs == cache.doc[..., None, None])
      scores.append(jnp.where(visible, score + jnp.log(jnp.maximum(counts, 1.0)), MASKED))
      values.append(cache.means.astype(values[0].dtype))
  return softmax.softmax_mix(scores, values)
