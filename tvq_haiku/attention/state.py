"""The states that attention carries from call to call.

Letters: B batch, G key/value heads, S codes, M memory length, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from tvq_haiku.attention.compressive_cache import EMPTY, NO_DOCUMENT
from tvq_haiku.types import Array


class AttentionState(NamedTuple):
  """State of attention over quantized keys; its size does not depend on the number of tokens."""

  position: Array  # [B] int32: number of tokens read so far, without padding
  memory_codes: Array  # [B, G, M] int32: EMPTY where the slot has no token
  memory_keys: Array  # [B, G, M, K] f32: quantized keys, oldest first
  memory_values: Array  # [B, G, M, V]
  memory_docs: Array  # [B, M] int32: document of each token; NO_DOCUMENT where there is none
  cache_counts: Array  # [B, G, S] f32: number of tokens of each code that have left the memory
  cache_means: Array  # [B, G, S, V] f32: their mean values
  cache_doc: Array  # [B] int32: the document that they belong to; NO_DOCUMENT for an empty cache


class KeyValueState(NamedTuple):
  """State of attention over plain keys: the last M tokens (a key/value cache)."""

  position: Array  # [B] int32: number of tokens read so far, without padding
  memory_keys: Array  # [B, G, M, K] oldest first
  memory_values: Array  # [B, G, M, V]
  memory_docs: Array  # [B, M] int32: NO_DOCUMENT where the slot has no token


def initial_attention_state(
  *,
  batch_size: int,
  n_kv_head: int,
  n_code: int,
  mem_len: int,
  d_k: int,
  d_v: int,
  dtype: jnp.dtype = jnp.float32,
) -> AttentionState:
  """Returns the state of `vq_attention` before the first token.

  Args:
    batch_size: B.
    n_kv_head: G.
    n_code: S.
    mem_len: M.
    d_k: K.
    d_v: V.
    dtype: of the values in memory.

  Returns:
    An empty state.

  >>> state = initial_attention_state(
  ...     batch_size=2, n_kv_head=1, n_code=8, mem_len=4, d_k=3, d_v=5)
  >>> state.cache_means.shape
  (2, 1, 8, 5)
  """
  B, G, M = batch_size, n_kv_head, mem_len
  return AttentionState(
    position=jnp.zeros((B,), jnp.int32),
    memory_codes=jnp.full((B, G, M), EMPTY, jnp.int32),
    memory_keys=jnp.zeros((B, G, M, d_k), jnp.float32),
    memory_values=jnp.zeros((B, G, M, d_v), dtype),
    memory_docs=jnp.full((B, M), NO_DOCUMENT, jnp.int32),
    cache_counts=jnp.zeros((B, G, n_code), jnp.float32),
    cache_means=jnp.zeros((B, G, n_code, d_v), jnp.float32),
    cache_doc=jnp.full((B,), NO_DOCUMENT, jnp.int32),
  )


def initial_key_value_state(
  *,
  batch_size: int,
  n_kv_head: int,
  mem_len: int,
  d_k: int,
  d_v: int,
  dtype: jnp.dtype = jnp.float32,
) -> KeyValueState:
  """Returns the state of `full_attention` before the first token.

  Args:
    batch_size: B.
    n_kv_head: G.
    mem_len: M.
    d_k: K.
    d_v: V.
    dtype: of the keys and values in memory.

  Returns:
    An empty state.

  >>> state = initial_key_value_state(batch_size=2, n_kv_head=1, mem_len=4, d_k=3, d_v=5)
  >>> state.memory_values.shape
  (2, 1, 4, 5)
  """
  B, G, M = batch_size, n_kv_head, mem_len
  return KeyValueState(
    position=jnp.zeros((B,), jnp.int32),
    memory_keys=jnp.zeros((B, G, M, d_k), dtype),
    memory_values=jnp.zeros((B, G, M, d_v), dtype),
    memory_docs=jnp.full((B, M), NO_DOCUMENT, jnp.int32),
  )
