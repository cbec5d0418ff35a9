"""Attention for one token at a time, with a ring buffer instead of a moving window.

Letters: B batch, M memory length, W = M+1 slots, H query heads, G key/value heads, Z = B·G,
P = H/G query heads for each key/value head, S codes, K key width, V value width.

A ring buffer of W slots holds the last W tokens: each step evicts the oldest token into the cache
and overwrites its slot. Then the query attends all W slots, in the order of the buffer, and the
cache. No token moves to another slot, and all batch elements write the same slot.

Two details let XLA update large arrays in place. It copies an array if it cannot exclude that a row
is read after it has been overwritten. So, first, keys, values and means have one leading axis Z, or
none if Z = 1: then no reshape stands between the update of a row and the product that reads all
rows. Second, the values that a step evicts are read at the end of the step before it.
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
  """Additional state of quantized keys: the codes of the window, and the compressive cache."""

  window_codes: Array  # [B, G, W] int32: EMPTY where the slot has no token
  counts: Array  # [B, G, S] f32: number of evicted tokens of each code
  means: Array  # [Z, S, V] f32: their mean values; undefined where the count is 0
  doc_id: Array  # [B] int32: the document that they belong to


class RingBuffer(NamedTuple):
  """State of one attention layer; the axis Z is missing if Z = 1."""

  keys: Array  # [Z, W, K]
  values: Array  # [Z, W, V]
  doc_ids: Array  # [B, W] int32: NO_DOCUMENT where the slot has no token
  evicted_next: Array  # [B, G, V]: the values in the slot that the next step overwrites
  code_memory: CodeMemory | None  # None: plain keys, and nothing beyond the window


class DecodeParams(NamedTuple):
  """Parameters of one attention layer, laid out for decoding."""

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

  code_memory = None
  if isinstance(state, AttentionState):
    code_memory = CodeMemory(
      window_codes=append_slot(state.memory_codes, EMPTY),
      counts=state.cache_counts,
      means=_merge_axes(state.cache_means),
      doc_id=state.cache_doc,
    )
  return RingBuffer(
    keys=_merge_axes(append_slot(state.memory_keys, 0)),
    values=_merge_axes(append_slot(state.memory_values, 0)),
    doc_ids=append_slot(state.memory_docs, NO_DOCUMENT),
    evicted_next=jnp.zeros_like(state.memory_values[:, :, 0]),
    code_memory=code_memory,
  )


def to_state(
  buffer: RingBuffer, *, position: Array, n_written: Array
) -> AttentionState | KeyValueState:
  """Converts a ring buffer to a state: the inverse of `from_state`.

  The buffer has one slot more than the memory of a state, so the oldest token moves to the cache.

  Args:
    buffer: the ring buffer.
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
  memory = dict(
    position=position,
    memory_keys=keys[:, :, 1:],
    memory_values=values[:, :, 1:],
    memory_docs=doc_ids[:, 1:],
  )
  if buffer.code_memory is None:
    return KeyValueState(**memory)
  codes = sort(buffer.code_memory.window_codes, axis=2)
  all_active = jnp.ones((B,), bool)
  cache = _evict(
    buffer.code_memory, codes[:, :, 0], values[:, :, 0], doc_ids[:, 0], active=all_active
  )
  means = cache.means.reshape(B, G, *cache.means.shape[-2:])
  return AttentionState(
    memory_codes=codes[:, :, 1:],
    cache_counts=cache.counts,
    cache_means=jnp.where(cache.counts[..., None] > 0.0, means, 0.0),
    cache_doc=cache.doc_id,
    **memory,
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
  """Adds one token to the buffer, and attends it and all tokens before it.

  Args:
    buffer: the tokens before this one.
    q: [B, H, K] queries. The scale of scores, K^(-1/2), is in `q`, `k` and `params` already.
    k: [B, G, K] keys.
    v: [B, G, V] values.
    params: biases, relative keys and codebook.
    n_written: [] int32: number of tokens that active batch elements wrote since `from_state`.
    doc_id: [B] int32: the document of the token.
    active: [B] bool. False: the batch element reads no token, and its output is undefined.
    agg_cache: False: the cache is updated, but not attended.

  Returns:
    [B, H, V] in the dtype of `v`, and the buffer with the token.
  """
  (B, H, _), (_, G, V), W = q.shape, v.shape, buffer.doc_ids.shape[1]
  chex.assert_equal_shape_prefix((k, v), 2)
  chex.assert_shape((doc_id, active), (B,))
  slot = (W - 1 + n_written) % W
  # 1. Quantize the key, and evict the oldest token from its slot into the cache.
  code_memory = buffer.code_memory
  if code_memory is not None:
    code = quantization.nearest_codes(k[:, None], params.codebook)  # [B, 1, G]
    k = quantization.look_up(code, params.codebook)[:, 0]
    code_memory = _replace_code(code_memory, code[:, 0], slot, buffer, active)
  # 2. Write the token to the slot.
  buffer = _write_slot(buffer, k, v, slot, doc_id, active)._replace(code_memory=code_memory)
  # 3. Score the window and the cache, with the queries q + u and q + w [B, G, P, K].
  q_u, q_w = (
    (q + bias.astype(q.dtype)).reshape(B, G, H // G, -1)
    for bias in (params.content_bias, params.position_bias)
  )
  scores = [_window_scores(buffer, q_u, q_w, params.relative_keys, slot, doc_id)]
  values = [buffer.values]
  if code_memory is not None and agg_cache:
    scores.append(_cache_scores(code_memory, q_u, params.codebook, doc_id))
    values.append(code_memory.means)
  # 4. Mix all values by one softmax.
  mixed = sum(
    jnp.einsum("...pn,...nv->...pv", _merge_axes(weights).astype(rows.dtype), rows, **_F32)
    for weights, rows in zip(softmax.softmax_weights(scores), values, strict=True)
  )
  return mixed.reshape(B, H, V).astype(v.dtype), buffer


def _replace_code(
  memory: CodeMemory, code: Array, slot: Array, buffer: RingBuffer, active: Array
) -> CodeMemory:
  """Evicts the token in `slot` into the cache, and writes the code [B, G] of the new token."""
  old_code = memory.window_codes[:, :, slot]
  memory = _evict(memory, old_code, buffer.evicted_next, buffer.doc_ids[:, slot], active=active)
  new_code = jnp.where(active[:, None], code, old_code)
  return memory._replace(window_codes=memory.window_codes.at[:, :, slot].set(new_code))


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
  return RingBuffer(keys, values, doc_ids, evicted_next, buffer.code_memory)


def _window_scores(
  buffer: RingBuffer,
  q_u: Array,
  q_w: Array,
  relative_keys: Array,
  slot: Array,
  doc_id: Array,
) -> Array:
  """Computes scores [B, G, P, W] f32 of the W slots for queries q + u and q + w [B, G, P, K]."""
  W = buffer.doc_ids.shape[1]
  queries = _merge_axes(q_u.astype(buffer.keys.dtype))
  scores = jnp.einsum("...pk,...wk->...pw", queries, buffer.keys, **_F32)
  bias = jnp.einsum("bgpk,gwk->bgpw", q_w, relative_keys, **_F32)
  # Slot j holds the token at distance (slot - j) mod W, and column c of `bias` has distance M - c.
  # So slot j needs column (M - slot + j) mod W: a slice of two copies that begins at M - slot.
  twice = jnp.concatenate([bias, bias], axis=-1)
  bias = jax.lax.dynamic_slice_in_dim(twice, W - 1 - slot, W, axis=-1)
  visible = (buffer.doc_ids == doc_id[:, None])[:, None, None]
  return jnp.where(visible, scores.reshape(bias.shape) + bias, MASKED)


def _cache_scores(memory: CodeMemory, q_u: Array, codebook: Array, doc_id: Array) -> Array:
  """Computes scores [B, G, P, S] f32 of the S codes for queries q + u [B, G, P, K]."""
  scores = jnp.einsum("bgpk,gsk->bgps", q_u.astype(jnp.float32), codebook, **_F32)
  scores += jnp.log(jnp.maximum(memory.counts, 1.0))[:, :, None]
  visible = (memory.counts > 0.0) & (memory.doc_id == doc_id)[:, None, None]
  return jnp.where(visible[:, :, None], scores, MASKED)


def _evict(
  memory: CodeMemory, code: Array, value: Array, doc_id: Array, *, active: Array
) -> CodeMemory:
  """Adds one token to the cache of each active batch element.

  Args:
    memory: its cache gets the token.
    code: [B, G] int32: code of the token. EMPTY, in all heads of a batch element: no token.
    value: [B, G, V].
    doc_id: [B] int32: document of the token. A cache of another document is dropped first.
    active: [B] bool.

  Returns:
    The memory with the token in its cache.
  """
  S = memory.counts.shape[-1]
  is_added = active[:, None] & (code != EMPTY)  # [B, G]
  doc_id = jnp.where(is_added[:, 0], doc_id, memory.doc_id)
  kept = jnp.where((doc_id == memory.doc_id)[:, None, None], memory.counts, 0.0)
  is_code = jnp.arange(S) == code[..., None]  # [B, G, S]
  counts = kept + (is_code & is_added[..., None])
  # The counts n_s of the token's code s [B, G, 1], before and after. A sum over all counts, which
  # are read anyway, is cheaper than two look-ups.
  n_kept, n = (jnp.sum(jnp.where(is_code, x, 0.0), axis=-1, keepdims=True) for x in (kept, counts))
  row = _merge_axes(jnp.maximum(code, 0))
  old = _read_row(memory.means, row).reshape(value.shape)  # m_s
  mean = (n_kept * old + value.astype(jnp.float32)) / jnp.maximum(n, 1.0)
  mean = jnp.where(is_added[..., None], mean, old)
  means = _replace_row(memory.means, row, _merge_axes(mean))
  return CodeMemory(memory.window_codes, counts, means, doc_id)


def _merge_axes(x: Array) -> Array:
  """Reshapes [B, G, ...] to [Z, ...], or to [...] if Z = 1."""
  return x.reshape(x.shape[2:] if x.shape[:2] == (1, 1) else (-1, *x.shape[2:]))


def _read_row(rows: Array, index: Array) -> Array:
  """Returns row `index` of each matrix [n, V] in `rows`.

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
  """Replaces row `index` of each matrix [n, V] in `rows`.

  Args:
    rows: [Z, n, V], or [n, V].
    index: [] or [Z] int32.
    new: [Z, V], or [V].

  Returns:
    As `rows`.
  """
  if rows.ndim == 2:
    return jax.lax.dynamic_update_index_in_dim(rows, new, index, 0)
  # XLA never fuses a scatter into the operations that read its result, so it is computed only once.
  Z = rows.shape[0]
  where = (jnp.arange(Z), jnp.broadcast_to(index, (Z,)))
  return rows.at[where].set(new, mode="promise_in_bounds", unique_indices=True)
