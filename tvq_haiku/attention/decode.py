"""Attention for one token at a time, with a ring buffer instead of a moving window.

Letters: B batch, M memory length, W = M+1 slots, H query heads, G key/value heads, Z = B·G,
P = H/G query heads for each key/value head, S codes, K key width, V value width.

A ring buffer of W slots holds the last W tokens: each step evicts the oldest token into the cache
and overwrites its slot. Then the query attends all W slots, in whatever order they lie, and the
cache. No array is moved, and all batch elements write the same slot.

Two details keep XLA from copying a large array for fear that a row is read after it has been
overwritten. First, keys, values and means have one leading axis Z, or none if Z = 1, so that no
reshape stands between the update of a row and the product that reads all rows. Second, the values
that a step evicts are read at the end of the step before.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention import quantization
from tvq_haiku.attention.compressive_cache import EMPTY, NO_DOCUMENT
from tvq_haiku.attention.state import AttentionState, KeyValueState
from tvq_haiku.ops import softmax
from tvq_haiku.ops.softmax import MASKED
from tvq_haiku.types import Array

_F32 = dict(preferred_element_type=jnp.float32)


class CodeMemory(NamedTuple):
  """Memory of quantized keys, in addition to the window: its codes, and the compressive cache."""

  window: Array  # [B, G, W] int32: EMPTY where the slot has no token
  counts: Array  # [B, G, S] f32: number of evicted tokens of each code
  means: Array  # [Z, S, V] f32: their mean values; undefined where the count is 0
  doc_id: Array  # [B] int32: the document that they belong to


class RingBuffer(NamedTuple):
  """Memory of one attention; the axis Z is missing if Z = 1."""

  keys: Array  # [Z, W, K]
  values: Array  # [Z, W, V]
  doc_ids: Array  # [B, W] int32: NO_DOCUMENT where the slot has no token
  evicted_next: Array  # [B, G, V]: the values in the slot that the next step overwrites
  codes: CodeMemory | None  # None: plain keys, and nothing beyond the window


class DecodeParams(NamedTuple):
  """Parameters of one attention, laid out for decoding."""

  content_bias: Array  # [H, K] u
  position_bias: Array  # [H, K] w
  relative_keys: Array  # [G, W, K] r_M, ..., r_0
  codebook: Array | None  # [G, S, K] f32; None: plain keys


def from_state(state: AttentionState | KeyValueState) -> RingBuffer:
  """Returns a ring buffer with the memory of `state`; slot M is free for the next token."""

  def append_slot(x: Array, filler: int) -> Array:
    axis = 1 if x.ndim == 2 else 2
    widths = [(0, int(i == axis)) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=filler)

  codes = None
  if isinstance(state, AttentionState):
    window = append_slot(state.memory_codes, EMPTY)
    codes = CodeMemory(window, state.cache_counts, _merge_axes(state.cache_means), state.cache_doc)
  return RingBuffer(
    keys=_merge_axes(append_slot(state.memory_keys, 0)),
    values=_merge_axes(append_slot(state.memory_values, 0)),
    doc_ids=append_slot(state.memory_docs, NO_DOCUMENT),
    evicted_next=jnp.zeros_like(state.memory_values[:, :, 0]),
    codes=codes,
  )


def to_state(
  buffer: RingBuffer, *, position: Array, n_written: Array
) -> AttentionState | KeyValueState:
  """Returns the state that the buffer stands for: the inverse of `from_state`.

  Args:
    buffer: after some steps.
    position: [B] int32: number of tokens read in all.
    n_written: [B] int32: number of tokens written to each batch element since `from_state`.
  """
  B, W = buffer.doc_ids.shape
  G = buffer.evicted_next.shape[1]
  chex.assert_shape((position, n_written), (B,))
  oldest_first = (W - 1 + n_written[:, None] + jnp.arange(W)) % W  # [B, W]

  def sort(x: Array, axis: int) -> Array:
    index = jnp.expand_dims(oldest_first, [i for i in range(x.ndim) if i not in (0, axis)])
    return jnp.take_along_axis(x, index, axis=axis)

  keys, values = (
    sort(x.reshape(B, G, *x.shape[-2:]), axis=2) for x in (buffer.keys, buffer.values)
  )
  doc_ids = sort(buffer.doc_ids, axis=1)
  window = dict(
    position=position,
    memory_keys=keys[:, :, 1:],
    memory_values=values[:, :, 1:],
    memory_docs=doc_ids[:, 1:],
  )
  if buffer.codes is None:
    return KeyValueState(**window)
  codes = sort(buffer.codes.window, axis=2)
  everywhere = jnp.ones((B,), bool)
  cache = _evict(buffer.codes, codes[:, :, 0], values[:, :, 0], doc_ids[:, 0], everywhere)
  means = cache.means.reshape(B, G, *cache.means.shape[-2:])
  return AttentionState(
    memory_codes=codes[:, :, 1:],
    cache_counts=cache.counts,
    cache_means=jnp.where(cache.counts[..., None] > 0.0, means, 0.0),
    cache_doc=cache.doc_id,
    **window,
  )


def decode_step(
  buffer: RingBuffer,
  q: Array,
  k: Array,
  v: Array,
  params: DecodeParams,
  *,
  n_written: Array,
  doc_id: Array,
  active: Array,
  agg_cache: bool = True,
) -> tuple[Array, RingBuffer]:
  """Reads one token, and attends it and all tokens before it.

  Args:
    buffer: the tokens before.
    q: [B, H, K] queries, scaled.
    k: [B, G, K] keys, scaled.
    v: [B, G, V] values.
    params: codebook, biases and relative keys, scaled like `q`.
    n_written: [] int32: number of tokens that active batch elements wrote since `from_state`.
    doc_id: [B] int32: the document of the token.
    active: [B] bool: the others keep their memory, and their output is undefined.
    agg_cache: False: the cache is kept, but not attended.

  Returns:
    [B, H, V] in the dtype of `v`, and the buffer with the token.
  """
  (B, H, _), (_, G, V) = q.shape, v.shape
  chex.assert_equal_shape_prefix((k, v), 2)
  chex.assert_shape((doc_id, active), (B,))
  slot = (buffer.doc_ids.shape[1] - 1 + n_written) % buffer.doc_ids.shape[1]
  # 1. Quantize the key. The oldest token moves from its slot to the cache.
  codes = buffer.codes
  if codes is not None:
    code = quantization.nearest_codes(k[:, None], params.codebook)  # [B, 1, G]
    k = quantization.look_up(code, params.codebook)[:, 0]
    codes = _replace_code(codes, code[:, 0], slot, buffer, active)
  # 2. The token takes its slot.
  buffer = _write_slot(buffer, k, v, slot, doc_id, active)._replace(codes=codes)
  # 3. Score the window and the cache.
  content, position = (
    (q + bias.astype(q.dtype)).reshape(B, G, H // G, -1)
    for bias in (params.content_bias, params.position_bias)
  )
  scores = [_window_scores(buffer, content, position, params.relative_keys, slot, doc_id)]
  values = [buffer.values]
  if codes is not None and agg_cache:
    scores.append(_cache_scores(codes, content, params.codebook, doc_id))
    values.append(codes.means)
  # 4. Mix all values by one softmax.
  mixed = sum(
    jnp.einsum("...pn,...nv->...pv", _merge_axes(weights).astype(rows.dtype), rows, **_F32)
    for weights, rows in zip(softmax.softmax_weights(scores), values, strict=True)
  )
  return mixed.reshape(B, H, V).astype(v.dtype), buffer


def _replace_code(
  codes: CodeMemory, code: Array, slot: Array, buffer: RingBuffer, active: Array
) -> CodeMemory:
  """Evicts the token in `slot` into the cache, and writes the code [B, G] of the new one."""
  old_code = codes.window[:, :, slot]
  codes = _evict(codes, old_code, buffer.evicted_next, buffer.doc_ids[:, slot], active)
  new_code = jnp.where(active[:, None], code, old_code)
  return codes._replace(window=codes.window.at[:, :, slot].set(new_code))


def _write_slot(
  buffer: RingBuffer, k: Array, v: Array, slot: Array, doc_id: Array, active: Array
) -> RingBuffer:
  """Writes the key [B, G, K], values [B, G, V] and document of active batch elements."""
  W = buffer.doc_ids.shape[1]
  is_active = active[:, None, None]
  doc_ids = buffer.doc_ids.at[:, slot].set(jnp.where(active, doc_id, buffer.doc_ids[:, slot]))
  old_k = _read_row(buffer.keys, slot)
  new_k = jnp.where(is_active, k.astype(old_k.dtype), old_k.reshape(k.shape))
  keys = _replace_row(buffer.keys, slot, _merge_axes(new_k))
  new_v = jnp.where(is_active, v, buffer.evicted_next)
  values = _replace_row(buffer.values, slot, _merge_axes(new_v))
  evicted_next = _read_row(values, (slot + 1) % W).reshape(v.shape)
  return RingBuffer(keys, values, doc_ids, evicted_next, buffer.codes)


def _window_scores(
  buffer: RingBuffer,
  content: Array,
  position: Array,
  relative_keys: Array,
  slot: Array,
  doc_id: Array,
) -> Array:
  """Computes scores [B, G, P, W] f32 of the W slots for queries [B, G, P, K]."""
  W = buffer.doc_ids.shape[1]
  queries = _merge_axes(content.astype(buffer.keys.dtype))
  scores = jnp.einsum("...pk,...wk->...pw", queries, buffer.keys, **_F32)
  bias = jnp.einsum("bgpk,gwk->bgpw", position, relative_keys, **_F32)
  # Slot j holds the token at distance (slot - j) mod W; column i of `bias` is of distance M - i.
  twice = jnp.concatenate([bias, bias], axis=-1)
  bias = jax.lax.dynamic_slice_in_dim(twice, W - 1 - slot, W, axis=-1)
  visible = (buffer.doc_ids == doc_id[:, None])[:, None, None]
  return jnp.where(visible, scores.reshape(bias.shape) + bias, MASKED)


def _cache_scores(codes: CodeMemory, content: Array, codebook: Array, doc_id: Array) -> Array:
  """Computes scores [B, G, P, S] f32 of the S codes for queries [B, G, P, K]."""
  scores = jnp.einsum("bgpk,gsk->bgps", content.astype(jnp.float32), codebook, **_F32)
  scores += jnp.log(jnp.maximum(codes.counts, 1.0))[:, :, None]
  visible = (codes.counts > 0.0) & (codes.doc_id == doc_id)[:, None, None]
  return jnp.where(visible[:, :, None], scores, MASKED)


def _evict(
  codes: CodeMemory, code: Array, value: Array, doc_id: Array, active: Array
) -> CodeMemory:
  """Adds one token to the cache of each active batch element.

  Args:
    codes: the cache.
    code: [B, G] int32: code of the token; EMPTY, in all heads of a batch element, adds nothing.
    value: [B, G, V].
    doc_id: [B] int32: document of the token; the counts of another document are dropped.
    active: [B] bool.

  Returns:
    The cache with the token.
  """
  S = codes.counts.shape[-1]
  is_added = active[:, None] & (code != EMPTY)  # [B, G]
  doc_id = jnp.where(is_added[:, 0], doc_id, codes.doc_id)
  kept = jnp.where((doc_id == codes.doc_id)[:, None, None], codes.counts, 0.0)
  is_code = jnp.arange(S) == code[..., None]  # [B, G, S]
  counts = kept + (is_code & is_added[..., None])
  # One pass over counts that are read anyway is cheaper than two look-ups.
  n_kept, n = (jnp.sum(jnp.where(is_code, x, 0.0), axis=-1, keepdims=True) for x in (kept, counts))
  row = _merge_axes(jnp.maximum(code, 0))
  old = _read_row(codes.means, row).reshape(value.shape)
  mean = (n_kept * old + value.astype(jnp.float32)) / jnp.maximum(n, 1.0)
  mean = jnp.where(is_added[..., None], mean, old)
  return CodeMemory(codes.window, counts, _replace_row(codes.means, row, _merge_axes(mean)), doc_id)


def _merge_axes(x: Array) -> Array:
  """Returns [Z, ...] from [B, G, ...]; [...] if Z = 1."""
  return x.reshape(x.shape[2:] if x.shape[:2] == (1, 1) else (-1, *x.shape[2:]))


def _read_row(rows: Array, index: Array) -> Array:
  """Returns row `index` of each [n, ...] in `rows`.

  Args:
    rows: [Z, n, V], or [n, V].
    index: [] or [Z] int32.

  Returns:
    [Z, V], or [V].
  """
  if index.ndim:
    return rows[jnp.arange(rows.shape[0]), index]
  return jax.lax.dynamic_index_in_dim(rows, index, rows.ndim - 2, keepdims=False)


def _replace_row(rows: Array, index: Array, new: Array) -> Array:
  """Replaces row `index` of each [n, ...] in `rows`.

  Args:
    rows: [Z, n, V], or [n, V].
    index: [] or [Z] int32.
    new: [Z, V], or [V].

  Returns:
    As `rows`.
  """
  if rows.ndim == 2:
    return jax.lax.dynamic_update_index_in_dim(rows, new, index, 0)
  # A scatter is never fused with what reads its result, which would compute it twice.
  Z = rows.shape[0]
  where = (jnp.arange(Z), jnp.broadcast_to(index, (Z,)))
  return rows.at[where].set(new, mode="promise_in_bounds", unique_indices=True)
