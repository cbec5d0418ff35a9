"""Softmax attention in tiles: quadratic time, but memory linear in the number of tokens.

Scores exist for one tile at a time: the L queries of a block and C keys. The forward pass keeps a
running maximum and normalizer for each query (the online softmax of Milakov & Gimelshein 2018, as
in FlashAttention); the derivatives recompute the scores of each tile, and compute the weights from
the scores and their logsumexp. Tiles in which no query of the block sees a key are skipped.

Letters: B batch, R query blocks, G key/value heads, P query heads for each of them, L block length,
C tile length, n keys, D relative keys, K key width, V value width, M memory length.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention.compressive_cache import NO_DOCUMENT
from tvq_haiku.ops import linear, matmul, positions
from tvq_haiku.ops.softmax import MASKED
from tvq_haiku.types import Array

_F32 = dict(preferred_element_type=jnp.float32)


class TileLayout(NamedTuple):
  """Sizes of tiles; hashable."""

  block_len: int  # L
  tile_len: int  # C
  mem_len: int | None  # M: query i is at index M + i of the keys. None: an encoder, at index i
  center: int  # row of the padded relative keys that belongs to key 0 and query 0


class TileQueries(NamedTuple):
  """Queries of R blocks."""

  content: Array  # [R, B, G, P, L, K] scale · (q + u)
  position: Array  # [R, B, G, P, L, K] scale · (q + w)
  doc_ids: Array  # [R, B, L] int32


class TileKeys(NamedTuple):
  """All keys, padded to a multiple of C."""

  keys: Array  # [B, G, n, K]
  values: Array  # [B, G, n, V]
  relative: Array  # [G, D, K] by falling distance, padded with zeros on both sides
  doc_ids: Array  # [B, n] int32: NO_DOCUMENT for padding


class _Tile(NamedTuple):
  """The keys of one tile, and their indices."""

  keys: Array  # [B, G, C, K]
  values: Array  # [B, G, C, V]
  relative: Array  # [G, L+C-1, K] by falling distance
  visible: Array  # [B, 1, 1, L, C] bool
  key_start: Array  # [] int32: index of the first key
  relative_start: Array  # [] int32: index of the first relative key


class _Residuals(NamedTuple):
  """Arrays that the derivatives of `tiled_attention` need."""

  queries: TileQueries
  keys: TileKeys
  mixed: Array  # [R, B, G, P, L, V]: the result
  logsumexp: Array  # [R, B, G, P, L, 1] f32: of the scores of all visible keys


class _Changes(NamedTuple):
  """Tangents or gradients of the arguments of `tiled_attention`."""

  content: Array  # [R, B, G, P, L, K]
  position: Array  # [R, B, G, P, L, K]
  keys: Array  # [B, G, n, K]
  values: Array  # [B, G, n, V]
  relative: Array  # [G, D, K]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def tiled_attention(layout: TileLayout, queries: TileQueries, keys: TileKeys) -> Array:
  """Mixes the values of all visible keys by softmax, tile by tile.

  Args:
    layout: sizes of tiles.
    queries: of R blocks.
    keys: all keys.

  Returns:
    [R, B, G, P, L, V] in the dtype of the values; zero for a query that sees no key.
  """
  return _forward(layout, queries, keys).mixed


@tiled_attention.defjvp
def _tiled_attention_jvp(
  layout: TileLayout,
  primals: tuple[TileQueries, TileKeys],
  tangents: tuple[TileQueries, TileKeys],
) -> tuple[Array, Array]:
  residuals = _forward(layout, *primals)
  d_queries, d_keys = tangents
  tangent = linear.linear_call(
    functools.partial(_tangent, layout),
    functools.partial(_gradients, layout),
    residuals,
    _Changes(*d_queries[:2], *d_keys[:3]),
  )
  return residuals.mixed, tangent


def visible_tiles(layout: TileLayout, doc_ids: Array, r: Array) -> tuple[Array, Array]:
  """Returns the range of tiles that block r sees.

  Args:
    layout: sizes of tiles.
    doc_ids: [B, n] int32: documents of the keys.
    r: [] int32: index of the block.

  Returns:
    The index of the first tile, and the index after the last.
  """
  chex.assert_rank((doc_ids, r), (2, 0))
  n_tile = doc_ids.shape[1] // layout.tile_len
  is_token = jnp.any(doc_ids != NO_DOCUMENT, axis=0)
  first = jnp.argmax(is_token).astype(jnp.int32)
  last = doc_ids.shape[1] - 1 - jnp.argmax(is_token[::-1]).astype(jnp.int32)
  start = r * layout.block_len
  if layout.mem_len is not None:
    first = jnp.maximum(first, start)
    last = jnp.minimum(last, start + layout.mem_len + layout.block_len - 1)
  return first // layout.tile_len, jnp.minimum(last // layout.tile_len + 1, n_tile)


def _take_tile(layout: TileLayout, query_docs: Array, keys: TileKeys, r: Array, c: Array) -> _Tile:
  """Returns tile c of the keys, with the relative keys and the mask for block r.

  Args:
    layout: sizes of tiles.
    query_docs: [B, L] int32: documents of the queries of the block.
    keys: all keys.
    r: [] int32: index of the block.
    c: [] int32: index of the tile.
  """
  L, C = layout.block_len, layout.tile_len
  start, n_relative = c * C, L + C - 1
  # Key j and query i use the relative key at center + j - i. The first one that the tile uses is
  # that of its first key and the last query of the block, i = r·L + L-1.
  first = layout.center + start - (r * L + L - 1)
  # A slice that would begin or end outside of the array has only zeros, and so has the nearest one.
  first = jnp.clip(first, 0, keys.relative.shape[1] - n_relative)
  take = jax.lax.dynamic_slice_in_dim
  doc_ids = take(keys.doc_ids, start, C, 1)
  visible = (query_docs[:, :, None] == doc_ids[:, None]) & (doc_ids[:, None] != NO_DOCUMENT)
  if layout.mem_len is not None:
    query_index = layout.mem_len + r * L + jnp.arange(L)[:, None]
    distance = query_index - (start + jnp.arange(C))
    visible &= (distance >= 0) & (distance <= layout.mem_len)
  return _Tile(
    keys=take(keys.keys, start, C, 2),
    values=take(keys.values, start, C, 2),
    relative=take(keys.relative, first, n_relative, 1),
    visible=visible[:, None, None],
    key_start=start,
    relative_start=first,
  )


def _tile_scores(content: Array, position: Array, keys: Array, relative: Array) -> Array:
  """Computes scores [B, G, P, L, C] f32 of queries [B, G, P, L, K] and keys [B, G, C, K]."""
  L, C = content.shape[-2], keys.shape[-2]
  chex.assert_axis_dimension(relative, 1, L + C - 1)
  by_distance = matmul.dots_per_head(position, relative, **_F32)  # bgplk,gdk->bgpld
  # Row i of `by_distance` has the bias of the tile's first key in column L-1-i. After alignment,
  # every row has it in column L-1.
  bias = positions.align_distances(by_distance, L)[..., L - 1 : L - 1 + C]
  return matmul.dots(content, keys, **_F32) + bias  # bgplk,bgck->bgplc


def _forward(layout: TileLayout, queries: TileQueries, keys: TileKeys) -> _Residuals:
  dtype = keys.values.dtype

  def attend_block(_, block: tuple[Array, TileQueries]):
    r, block_queries = block
    content, position, doc_ids = block_queries

    def attend_tile(c: Array, carry: tuple[Array, Array, Array]):
      maximum, normalizer, mixed = carry
      tile = _take_tile(layout, doc_ids, keys, r, c)
      scores = _tile_scores(content, position, tile.keys, tile.relative)
      scores = jnp.where(tile.visible, scores, MASKED)
      new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
      weights = jnp.exp(scores - new_maximum)
      decay = jnp.exp(maximum - new_maximum)
      normalizer = decay * normalizer + jnp.sum(weights, axis=-1, keepdims=True)
      # bgplc,bgcv->bgplv
      mixed = decay * mixed + matmul.mix(weights.astype(dtype), tile.values, **_F32)
      return new_maximum, normalizer, mixed

    rows = content.shape[:-1]  # [B, G, P, L]
    start = (
      jnp.full((*rows, 1), MASKED, jnp.float32),
      jnp.zeros((*rows, 1), jnp.float32),
      jnp.zeros((*rows, keys.values.shape[-1]), jnp.float32),
    )
    tiles = visible_tiles(layout, keys.doc_ids, r)
    maximum, normalizer, mixed = jax.lax.fori_loop(*tiles, attend_tile, start)
    # A padding query may see no key. Its weights are zero, here and (exp(MASKED - 0)) in the
    # derivatives.
    sees_keys = maximum > MASKED
    mixed = jnp.where(sees_keys, mixed / jnp.where(sees_keys, normalizer, 1.0), 0.0)
    logsumexp = jnp.where(sees_keys, maximum + jnp.log(normalizer), 0.0)
    return None, (mixed.astype(dtype), logsumexp)

  _, (mixed, logsumexp) = jax.lax.scan(attend_block, None, (_block_indices(queries), queries))
  return _Residuals(queries, keys, mixed, logsumexp)


def _block_indices(queries: TileQueries) -> Array:
  return jnp.arange(queries.content.shape[0], dtype=jnp.int32)


def _tangent(layout: TileLayout, residuals: _Residuals, tangents: _Changes) -> Array:
  """Returns the tangent of the result: see `ops.softmax`."""
  queries, keys, mixed, logsumexp = residuals
  f32, dtype = jnp.float32, mixed.dtype

  def block_tangent(_, block):
    r, (content, position, doc_ids), mixed, logsumexp, d_content, d_position = block

    def tile_tangent(c: Array, carry: tuple[Array, Array]):
      d_mixed, common = carry
      tile = _take_tile(layout, doc_ids, keys, r, c)
      d_tile = _take_tile(layout, doc_ids, keys._replace(**tangents_of_keys), r, c)
      scores, d_scores = jax.jvp(
        _tile_scores,
        (content, position, tile.keys, tile.relative),
        (d_content, d_position, d_tile.keys, d_tile.relative),
      )
      weights = jnp.exp(jnp.where(tile.visible, scores, MASKED) - logsumexp)
      d_weights = weights * d_scores
      # bgplc,bgcv->bgplv
      d_mixed += matmul.mix(d_weights.astype(dtype), tile.values, **_F32)
      d_mixed += matmul.mix(weights.astype(dtype), d_tile.values, **_F32)
      return d_mixed, common + jnp.sum(d_weights, axis=-1, keepdims=True)

    start = jnp.zeros(mixed.shape, f32), jnp.zeros(logsumexp.shape, f32)
    tiles = visible_tiles(layout, keys.doc_ids, r)
    d_mixed, common = jax.lax.fori_loop(*tiles, tile_tangent, start)
    return None, (d_mixed - common * mixed.astype(f32)).astype(dtype)

  d_content, d_position, *rest = tangents
  tangents_of_keys = dict(zip(("keys", "values", "relative"), rest, strict=True))
  blocks = (_block_indices(queries), queries, mixed, logsumexp, d_content, d_position)
  return jax.lax.scan(block_tangent, None, blocks)[1]


def _gradients(layout: TileLayout, residuals: _Residuals, gradient: Array) -> _Changes:
  """Returns the gradients of the arguments for the gradient [R, B, G, P, L, V] of the result."""
  queries, keys, mixed, logsumexp = residuals
  f32 = jnp.float32
  # As in `ops.softmax`, d s_j = w_j (g·v_j - sum_i w_i g·v_i), and the sum equals g·(the output).
  common = jnp.sum(gradient.astype(f32) * mixed.astype(f32), axis=-1, keepdims=True)

  def block_gradients(key_gradients, block):
    r, (content, position, doc_ids), gradient, logsumexp, common = block

    def tile_gradients(c: Array, carry):
      d_content, d_position, d_keys, d_values, d_relative = carry
      tile = _take_tile(layout, doc_ids, keys, r, c)
      scores, scores_vjp = jax.vjp(_tile_scores, content, position, tile.keys, tile.relative)
      weights = jnp.exp(jnp.where(tile.visible, scores, MASKED) - logsumexp)
      # bgplv,bgcv->bgplc
      d_scores = weights * (matmul.dots(gradient, tile.values, **_F32) - common)
      tile_content, tile_position, tile_keys, tile_relative = scores_vjp(d_scores)
      # bgplc,bgplv->bgcv
      tile_values = matmul.pool(weights.astype(tile.values.dtype), gradient, n_batch=2, **_F32)
      return (
        d_content + tile_content.astype(f32),
        d_position + tile_position.astype(f32),
        _add_slice(d_keys, tile_keys, tile.key_start, axis=2),
        _add_slice(d_values, tile_values, tile.key_start, axis=2),
        _add_slice(d_relative, tile_relative, tile.relative_start, axis=1),
      )

    zeros = jnp.zeros(content.shape, f32)
    d_content, d_position, *key_gradients = jax.lax.fori_loop(
      *visible_tiles(layout, keys.doc_ids, r), tile_gradients, (zeros, zeros, *key_gradients)
    )
    query_gradients = d_content.astype(content.dtype), d_position.astype(position.dtype)
    return tuple(key_gradients), query_gradients

  differentiable = (keys.keys, keys.values, keys.relative)
  key_gradients, query_gradients = jax.lax.scan(
    block_gradients,
    tuple(jnp.zeros(x.shape, f32) for x in differentiable),
    (_block_indices(queries), queries, gradient, logsumexp, common),
  )
  key_gradients = (d.astype(x.dtype) for d, x in zip(key_gradients, differentiable, strict=True))
  return _Changes(*query_gradients, *key_gradients)


def _add_slice(x: Array, y: Array, start: Array, *, axis: int) -> Array:
  """Adds y, in float32, to the slice of x that begins at index `start` of an axis."""
  old = jax.lax.dynamic_slice_in_dim(x, start, y.shape[axis], axis)
  new = old + y.astype(jnp.float32)
  return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis)
