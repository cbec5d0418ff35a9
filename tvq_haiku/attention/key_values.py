"""Keys and values of consecutive tokens: computed, read from a state, and written to a state.

Attention by blocks, full attention and sharded attention share these functions; decoding has a
layout of its own.

Letters: B batch, T tokens, G key/value heads, S codes, K key width, V value width, M memory length.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention import blocking, quantization
from tvq_haiku.attention.compressive_cache import EMPTY, NO_DOCUMENT, Cache
from tvq_haiku.attention.state import AttentionState, KeyValueState
from tvq_haiku.types import Array


class KeyValues(NamedTuple):
  """Keys and values of n tokens, oldest first. In R blocks, the axis n is two axes R, L."""

  codes: Array | None  # [B, G, n] int32: EMPTY where there is no token. None: plain keys
  keys: Array  # [B, G, n, K]
  values: Array  # [B, G, n, V]
  doc_ids: Array  # [B, 1, n] int32


def quantize(
  k: Array, v: Array, codebook: Array, doc_ids: Array, n_read: Array
) -> tuple[Array, KeyValues]:
  """Quantizes keys, and lays keys and values out by head.

  Args:
    k: [B, T, G, K] keys.
    v: [B, T, G, V] values.
    codebook: [G, S, K]; it gets no gradient.
    doc_ids: [B, T] int32.
    n_read: [B] int32: number of tokens of each row; padding follows them.

  Returns:
    The codes [B, T, G] of all keys, and the T tokens, with code EMPTY for padding.
  """
  B, T, _, _ = k.shape
  chex.assert_shape((doc_ids, n_read), [(B, T), (B,)])
  codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))
  codes = quantization.nearest_codes(k, codebook)
  nearest = quantization.look_up(codes, codebook)
  k_hat = quantization.straight_through(k.astype(jnp.float32), nearest)
  is_token = (jnp.arange(T) < n_read[:, None])[:, None]  # [B, 1, T]
  codes_by_head = jnp.where(is_token, codes.swapaxes(1, 2), EMPTY)
  tokens = KeyValues(codes_by_head, k_hat.swapaxes(1, 2), v.swapaxes(1, 2), doc_ids[:, None])
  return codes, tokens


def lay_out(k: Array, v: Array, doc_ids: Array, n_read: Array) -> KeyValues:
  """Lays plain keys and values out by head; padding belongs to NO_DOCUMENT.

  Args:
    k: [B, T, G, K] keys.
    v: [B, T, G, V] values.
    doc_ids: [B, T] int32.
    n_read: [B] int32: number of tokens of each row; padding follows them.

  Returns:
    The T tokens.
  """
  B, T = k.shape[:2]
  chex.assert_shape((doc_ids, n_read), [(B, T), (B,)])
  doc_ids = jnp.where(jnp.arange(T) < n_read[:, None], doc_ids, NO_DOCUMENT)
  return KeyValues(None, k.swapaxes(1, 2), v.swapaxes(1, 2), doc_ids[:, None])


def continued_doc_ids(state: AttentionState | KeyValueState, length: int) -> Array:
  """Returns doc_ids [B, T] of tokens that continue the last document of the state, or else 0."""
  last = jnp.maximum(state.memory_docs[:, -1:], 0)
  return jnp.broadcast_to(last, (last.shape[0], length))


def memory_of(state: AttentionState | KeyValueState, like: KeyValues) -> KeyValues:
  """Returns the M tokens in memory, with the dtypes of `like`."""
  codes = state.memory_codes if isinstance(state, AttentionState) else None
  keys = state.memory_keys.astype(like.keys.dtype)
  values = state.memory_values.astype(like.values.dtype)
  return KeyValues(codes, keys, values, state.memory_docs[:, None])


def cache_of(state: AttentionState) -> Cache:
  """Returns the cache of the state as one summary (R = 1)."""
  return Cache(
    state.cache_counts[:, :, None], state.cache_means[:, :, None], state.cache_doc[:, None, None]
  )


def next_state(
  state: AttentionState | KeyValueState,
  n_read: Array,
  memory: KeyValues,
  cache: Cache | None = None,
) -> AttentionState | KeyValueState:
  """Returns the state after some tokens, with the dtypes of the state before them.

  Args:
    state: the state before the tokens.
    n_read: [B] int32: number of tokens read since `state`.
    memory: the last M tokens.
    cache: one summary (R = 1) of all tokens before those. None: keys are not quantized.

  Returns:
    A state of the same type.
  """
  chex.assert_equal_shape((state.position, n_read))
  after = dict(
    position=state.position + n_read,
    memory_keys=memory.keys.astype(state.memory_keys.dtype),
    memory_values=memory.values.astype(state.memory_values.dtype),
    memory_docs=memory.doc_ids[:, 0],
  )
  if cache is None:
    return KeyValueState(**after)
  return AttentionState(
    memory_codes=memory.codes,
    cache_counts=cache.counts[:, :, 0],
    cache_means=cache.means[:, :, 0],
    cache_doc=cache.doc_id[:, 0, 0],
    **after,
  )


def last_tokens(memory: KeyValues, tokens: KeyValues, n_read: Array | None) -> KeyValues:
  """Returns the last M tokens of each row of (memory, tokens), padding excluded.

  Args:
    memory: M tokens.
    tokens: T tokens.
    n_read: [B] int32: number of tokens of each row before its padding. None: T.

  Returns:
    M tokens.
  """
  M, T = (x.doc_ids.shape[2] for x in (memory, tokens))
  if n_read is None and T >= M:
    return blocking.slice_tokens(tokens, T - M, T)
  sequence = blocking.concatenate(memory, tokens)
  if n_read is None:
    return blocking.slice_tokens(sequence, T, T + M)
  chex.assert_shape(n_read, tokens.doc_ids.shape[:1])
  # A row ends at slot M + n_read of the sequence.
  take = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, M, axis=1))
  return jax.tree.map(lambda x: take(x, n_read), sequence)
