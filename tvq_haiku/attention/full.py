"""Quadratic attention over plain keys: the baseline that quantized attention is measured against.

Letters: B batch, T tokens, R query blocks, L block length, C keys of a tile, M context length,
H query heads, G key/value heads, P = H/G, A = P·L rows of a query block, K key width, V value width.

Query i attends token j of its document, 0 <= i-j <= M, with weight softmax_j of
  (q_i + u)·k_j + (q_i + v)·r_{i-j}.
Scores exist for one tile [A, C] at a time. Tiles that no query of a block may see are skipped,
and the backward pass computes scores again from the logarithm of each row's normaliser.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.attention import blocking
from tvq_haiku.attention.block_scores import MASKED
from tvq_haiku.attention.compressive_cache import NO_DOCUMENT
from tvq_haiku.attention.state import KeyValueState
from tvq_haiku.ops import matmul, positions
from tvq_haiku.types import Array
from tvq_haiku.utils import checks

_F32 = dict(preferred_element_type=jnp.float32)


class FullOutput(NamedTuple):
  """What `full_attention` returns."""

  values: Array  # [B, T, H, V]
  state: KeyValueState | None  # None from an encoder


class _Tokens(NamedTuple):
  """Keys and values in reading order."""

  keys: Array  # [B, G, n, K]
  values: Array  # [B, G, n, V]
  docs: Array  # [B, 1, n] int32


class _Layout(NamedTuple):
  """Sizes of tiles; hashable."""

  block_len: int  # L
  tile_len: int  # C
  window: int | None  # M: place M + i of the keys' row is that of query i. None: encoder
  centre: int  # row of the padded relative keys that belongs to key 0 and query 0


def full_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  state: KeyValueState,
  block_len: int = 256,
  is_causal: bool = True,
  scale: float | None = None,
  relative_keys: Array | None = None,
  content_bias: Array | None = None,
  position_bias: Array | None = None,
  segment_ids: Array | None = None,
  lengths: Array | None = None,
) -> FullOutput:
  """Softmax attention in quadratic time and linear memory; arguments as in `vq_attention`.

  Args:
    q: [B, T, H, K].
    k: [B, T, G, K].
    v: [B, T, G, V].
    state: what was read before; its length M is the context. An encoder attends all T tokens,
      and takes from the state only M, the reach of the bias.
    block_len: L; values do not depend on it.
    is_causal: False attends tokens before and after.
    scale: None: K^(-1/2).
    relative_keys: [M+1, G, K], or [2M+1, G, K] for an encoder.
    content_bias: [H, K].
    position_bias: [H, K].
    segment_ids: [B, T] int32.
    lengths: [B] int32: tokens before the padding at the end of each row.

  Returns:
    values [B, T, H, V] in the dtype of `v`, and the state after the T tokens.

  >>> from tvq_haiku.attention.state import initial_key_value_state
  >>> q = jax.random.normal(jax.random.key(0), (1, 10, 2, 4))
  >>> state = initial_key_value_state(batch_size=1, n_kv_head=2, mem_len=10, d_k=4, d_v=4)
  >>> out = full_attention(q, q, q, state=state, block_len=3)
  >>> bool(jnp.allclose(out.values, jax.nn.dot_product_attention(q, q, q, is_causal=True), atol=1e-5))
  True
  """
  M, real = state.memory_docs.shape[1], jnp.floating
  distances = "M+1" if is_causal else "2M+1"
  sizes = checks.check_arrays(
    "full_attention",
    {"M": M, "M+1": M + 1, "2M+1": 2 * M + 1},
    {
      "q": (q, "B T H K", real),
      "k": (k, "B T G K", real),
      "v": (v, "B T G V", real),
      "state.memory_keys": (state.memory_keys, "B G M K", real),
      "relative_keys": (relative_keys, f"{distances} G K", real),
      "content_bias": (content_bias, "H K", real),
      "position_bias": (position_bias, "H K", real),
      "segment_ids": (segment_ids, "B T", jnp.integer),
      "lengths": (lengths, "B", jnp.integer),
    },
  )
  B, T, H, K, G = (sizes[letter] for letter in "BTHKG")
  checks.check_heads("full_attention", H, G)
  scale = K**-0.5 if scale is None else scale
  L = min(block_len, T)
  C = max(2 * L, min(2 * block_len, M))  # for few queries, too, tiles of many keys
  R = -(-T // L)

  n_read = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
  if segment_ids is None:
    segment_ids = jnp.broadcast_to(jnp.maximum(state.memory_docs[:, -1:], 0), (B, T))
  docs = jnp.where(jnp.arange(T) < n_read[:, None], segment_ids, NO_DOCUMENT)
  sequence = _Tokens(k.swapaxes(1, 2), v.swapaxes(1, 2), docs[:, None])
  memory = _Tokens(
    state.memory_keys.astype(k.dtype),
    state.memory_values.astype(v.dtype),
    state.memory_docs[:, None],
  )

  row = blocking.concatenate(memory, sequence) if is_causal else sequence
  row = blocking.pad_tokens(row, -row.docs.shape[2] % C, _Tokens(0, 0, NO_DOCUMENT))
  # Zero rows around r_M, ..., r_0 (..., r_-M): no bias beyond the reach, whatever a tile touches.
  if relative_keys is None:
    relative_keys = jnp.zeros((1, G, K))
  edge = L + C
  relative = jnp.flip(relative_keys, axis=0).astype(q.dtype).swapaxes(0, 1)
  relative = jnp.pad(relative, ((0, 0), (edge, edge), (0, 0)))
  layout = _Layout(
    L, C, M if is_causal else None, edge + (0 if is_causal else relative_keys.shape[0] // 2)
  )
  query_docs = blocking.split_blocks(blocking.pad_tokens(docs[:, None], R * L - T, NO_DOCUMENT), R)[
    :, 0
  ]  # [B, R, L]
  content, position = (
    jnp.moveaxis(blocking.lay_out_queries(q, bias, scale, G, L), 2, 0)
    for bias in (content_bias, position_bias)
  )
  values = _attend(
    layout, content, position, row.keys, row.values, relative, query_docs, row.docs[:, 0]
  )
  values = blocking.restore_layout(jnp.moveaxis(values, 0, 2), L, T)
  if not is_causal:
    return FullOutput(values, None)
  memory = blocking.last_tokens(memory, sequence, lengths)
  return FullOutput(
    values,
    KeyValueState(
      state.position + n_read,
      memory.keys.astype(state.memory_keys.dtype),
      memory.values.astype(state.memory_values.dtype),
      memory.docs[:, 0],
    ),
  )


def _tiles(layout: _Layout, key_docs: Array, r: Array) -> tuple[Array, Array]:
  """The first tile that block r sees, and the one after the last."""
  n_tile = key_docs.shape[1] // layout.tile_len
  is_token = jnp.any(key_docs != NO_DOCUMENT, axis=0)
  first, last = jnp.argmax(is_token), key_docs.shape[1] - 1 - jnp.argmax(is_token[::-1])
  start = r * layout.block_len
  if layout.window is not None:
    first = jnp.maximum(first, start)
    last = jnp.minimum(last, start + layout.window + layout.block_len - 1)
  stop = jnp.minimum(last // layout.tile_len + 1, n_tile)
  return first // layout.tile_len, stop


def _tile_scores(
  layout: _Layout, content: Array, position: Array, keys: Array, relative: Array
) -> Array:
  """Scores [B, G, A, C] of a block and a tile; relative [G, L+C-1, K] by falling distance."""
  L, C = layout.block_len, layout.tile_len
  by_distance = matmul.dots_per_head(position, relative, **_F32)
  by_head = by_distance.reshape(*by_distance.shape[:2], -1, L, L + C - 1)
  # Row i looks up distances that start L-1-i columns later.
  bias = positions.align_distances(by_head, L)[..., L - 1 : L - 1 + C]
  return matmul.dots(content, keys, **_F32) + bias.reshape(*by_distance.shape[:3], C)


def _tile_mask(layout: _Layout, query_docs: Array, key_docs: Array, r: Array, c: Array) -> Array:
  """Who sees whom: [B, 1, L, C]."""
  visible = query_docs[:, :, None] == key_docs[:, None]
  visible &= key_docs[:, None] != NO_DOCUMENT
  if layout.window is not None:
    place = layout.window + r * layout.block_len + jnp.arange(layout.block_len)[:, None]
    distance = place - (c * layout.tile_len + jnp.arange(layout.tile_len))
    visible &= (distance >= 0) & (distance <= layout.window)
  return visible[:, None]


def _slices(
  layout: _Layout, keys: Array, values: Array, relative: Array, key_docs: Array, r: Array, c: Array
):
  """What tile c holds, and where its relative keys start."""
  start, C = c * layout.tile_len, layout.tile_len
  first = layout.centre + start - (r + 1) * layout.block_len + 1
  length = layout.block_len + C - 1
  first = jnp.clip(first, 0, relative.shape[1] - length)  # far away, all are zero
  take = jax.lax.dynamic_slice_in_dim
  return (
    take(keys, start, C, 2),
    take(values, start, C, 2),
    take(relative, first, length, 1),
    take(key_docs, start, C, 1),
    start,
    first,
  )


def _masked(scores: Array, visible: Array) -> Array:
  heads = scores.reshape(*scores.shape[:2], -1, *visible.shape[-2:])
  return jnp.where(visible[:, :, None], heads, MASKED).reshape(scores.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  layout: _Layout,
  content: Array,
  position: Array,
  keys: Array,
  values: Array,
  relative: Array,
  query_docs: Array,
  key_docs: Array,
) -> Array:
  """Values [R, B, G, A, V] for queries [R, B, G, A, K]."""
  return _forward(layout, content, position, keys, values, relative, query_docs, key_docs)[0]


def _forward(layout, content, position, keys, values, relative, query_docs, key_docs):
  dtype = values.dtype

  def attend_block(_, block):
    r, content, position, docs = block

    def attend_tile(c, carry):
      greatest, total, mixed = carry
      k, v, rel, k_docs, *_ = _slices(layout, keys, values, relative, key_docs, r, c)
      scores = _masked(
        _tile_scores(layout, content, position, k, rel), _tile_mask(layout, docs, k_docs, r, c)
      )
      new = jnp.maximum(greatest, jnp.max(scores, axis=-1, keepdims=True))
      weights = jnp.exp(scores - new)
      shrink = jnp.exp(greatest - new)
      total = shrink * total + jnp.sum(weights, axis=-1, keepdims=True)
      return new, total, shrink * mixed + matmul.mix(weights.astype(dtype), v, **_F32)

    rows = content.shape[:-1]
    start = (
      jnp.full((*rows, 1), MASKED),
      jnp.zeros((*rows, 1)),
      jnp.zeros((*rows, values.shape[-1])),
    )
    greatest, total, mixed = jax.lax.fori_loop(*_tiles(layout, key_docs, r), attend_tile, start)
    # A row of padding may see nothing: no weights, here and in the backward pass.
    seen = greatest > MASKED
    mixed = jnp.where(seen, mixed / jnp.where(seen, total, 1.0), 0.0)
    return None, (mixed.astype(dtype), jnp.where(seen, greatest + jnp.log(total), 0.0))

  blocks_of = (jnp.arange(content.shape[0]), content, position, query_docs.swapaxes(0, 1))
  _, (mixed, log_total) = jax.lax.scan(attend_block, None, blocks_of)
  return mixed, (content, position, keys, values, relative, query_docs, key_docs, mixed, log_total)


def _backward(layout, residuals, gradient):
  content, position, keys, values, relative, query_docs, key_docs, mixed, log_total = residuals
  f32 = jnp.float32
  common = jnp.sum(gradient.astype(f32) * mixed.astype(f32), axis=-1, keepdims=True)

  def block_gradients(shared, block):
    r, content, position, docs, gradient, log_total, common = block

    def tile_gradients(c, carry):
      d_content, d_position, d_keys, d_values, d_relative = carry
      k, v, rel, k_docs, start, first = _slices(layout, keys, values, relative, key_docs, r, c)
      scores, transposed = jax.vjp(
        functools.partial(_tile_scores, layout), content, position, k, rel
      )
      weights = jnp.exp(_masked(scores, _tile_mask(layout, docs, k_docs, r, c)) - log_total)
      d_scores = weights * (matmul.dots(gradient, v, **_F32) - common)
      parts = transposed(d_scores)
      d_v = matmul.pool(weights.astype(v.dtype), gradient, **_F32)

      def add(x: Array, y: Array, start: Array, axis: int) -> Array:
        old = jax.lax.dynamic_slice_in_dim(x, start, y.shape[axis], axis)
        return jax.lax.dynamic_update_slice_in_dim(x, old + y.astype(f32), start, axis)

      return (
        d_content + parts[0].astype(f32),
        d_position + parts[1].astype(f32),
        add(d_keys, parts[2], start, 2),
        add(d_values, d_v, start, 2),
        add(d_relative, parts[3], first, 1),
      )

    zeros = jnp.zeros(content.shape)
    d_content, d_position, *shared = jax.lax.fori_loop(
      *_tiles(layout, key_docs, r), tile_gradients, (zeros, zeros, *shared)
    )
    return tuple(shared), (d_content.astype(content.dtype), d_position.astype(position.dtype))

  shared = tuple(jnp.zeros(x.shape) for x in (keys, values, relative))
  blocks_of = (
    jnp.arange(content.shape[0]),
    content,
    position,
    query_docs.swapaxes(0, 1),
    gradient,
    log_total,
    common,
  )
  shared, (d_content, d_position) = jax.lax.scan(block_gradients, shared, blocks_of)
  d_keys, d_values, d_relative = (
    d.astype(x.dtype) for d, x in zip(shared, (keys, values, relative))
  )
  return d_content, d_position, d_keys, d_values, d_relative, None, None


_attend.defvjp(_forward, _backward)
