"""Keys and values in reading order: made from tokens, read from a state, and stored in one.

Every form of attention (blocks, one token, full, sharded) goes through these functions.

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
  """Keys and values of n tokens; or of R blocks of them, with n = R, L from axis 2 on."""

  codes: Array | None  # [B, G, n] int32: EMPTY where there is no token. None: plain keys
  keys: Array  # [B, G, n, K]
  values: Array  # [B, G, n, V]
  doc_ids: Array  # [B, 1, n] int32


def quantized(
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
    The codes [B, T, G] of all keys, and the T tokens, EMPTY where there is padding.
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


def unquantized(k: Array, v: Array, doc_ids: Array, n_read: Array) -> KeyValues:
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
  """Returns doc_ids [B, T] of T tokens that continue the last document of the state."""
  last = jnp.maximum(state.memory_docs[:, -1:], 0)
  return jnp.broadcast_to(last, (last.shape[0], length))


def memory(state: AttentionState | KeyValueState, like: KeyValues) -> KeyValues:
  """Returns the M tokens in memory, with the dtypes of `like`."""
  codes = state.memory_codes if isinstance(state, AttentionState) else None
  keys = state.memory_keys.astype(like.keys.dtype)
  values = state.memory_values.astype(like.values.dtype)
  return KeyValues(codes, keys, values, state.memory_docs[:, None])


def cache(state: AttentionState) -> Cache:
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
    state: before the tokens.
    n_read: [B] int32: number of tokens read.
    memory: the last M tokens.
    cache: one summary of all tokens before those; None: keys are not quantized.

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


def last_tokens(memory: KeyValues, tokens: KeyValues, lengths: Array | None) -> KeyValues:
  """Returns the last M tokens of the memory followed by the tokens.

  Args:
    memory: M tokens.
    tokens: T tokens.
    lengths: [B] int32: number of tokens of each row that count, from the first on. None: all T.

  Returns:
    M tokens.
  """
  M, T = (x.doc_ids.shape[2] for x in (memory, tokens))
  if lengths is not None:
    chex.assert_shape(lengths, tokens.doc_ids.shape[:1])
  if lengths is None and T >= M:
    return blocking.slice_tokens(tokens, T - M, T)
  both = blocking.concatenate(memory, tokens)
  if lengths is None:
    return blocking.slice_tokens(both, T, T + M)
  take = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, M, axis=1))
  return jax.tree.map(lambda x: take(x, lengths), both)
