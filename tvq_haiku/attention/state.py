"""What an attention remembers between two calls."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from tvq_haiku.attention.compressive_cache import NO_DOCUMENT
from tvq_haiku.types import Array


class AttentionState(NamedTuple):
  """What one attention remembers; its size does not depend on how much it has read."""

  position: Array  # [B] int32: tokens read so far, without padding
  memory_codes: Array  # [B, G, M] int32: S where the slot is empty
  memory_keys: Array  # [B, G, M, K] f32: quantized keys, oldest first
  memory_values: Array  # [B, G, M, V]
  memory_docs: Array  # [B, M] int32
  cache_counts: Array  # [B, G, S] f32: tokens of each code that have left the memory
  cache_means: Array  # [B, G, S, V] f32: their mean values
  cache_doc: Array  # [B] int32: the document that the cache belongs to


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
  """The state before the first token.

  >>> state = initial_attention_state(
  ...     batch_size=2, n_kv_head=1, n_code=8, mem_len=4, d_k=3, d_v=5)
  >>> state.cache_means.shape
  (2, 1, 8, 5)
  """
  b, g, m = batch_size, n_kv_head, mem_len
  return AttentionState(
    position=jnp.zeros((b,), jnp.int32),
    memory_codes=jnp.full((b, g, m), n_code, jnp.int32),
    memory_keys=jnp.zeros((b, g, m, d_k), jnp.float32),
    memory_values=jnp.zeros((b, g, m, d_v), dtype),
    memory_docs=jnp.full((b, m), NO_DOCUMENT, jnp.int32),
    cache_counts=jnp.zeros((b, g, n_code), jnp.float32),
    cache_means=jnp.zeros((b, g, n_code, d_v), jnp.float32),
    cache_doc=jnp.full((b,), NO_DOCUMENT, jnp.int32),
  )


class KeyValueState(NamedTuple):
  """The last M tokens: the key/value cache."""

  position: Array  # [B] int32: tokens read so far, without padding
  memory_keys: Array  # [B, G, M, K] oldest first
  memory_values: Array  # [B, G, M, V]
  memory_docs: Array  # [B, M] int32: -1 where the slot is empty


def initial_key_value_state(
  *,
  batch_size: int,
  n_kv_head: int,
  mem_len: int,
  d_k: int,
  d_v: int,
  dtype: jnp.dtype = jnp.float32,
) -> KeyValueState:
  """The state before the first token.

  >>> state = initial_key_value_state(batch_size=2, n_kv_head=1, mem_len=4, d_k=3, d_v=5)
  >>> state.memory_values.shape
  (2, 1, 4, 5)
  """
  b, g, m = batch_size, n_kv_head, mem_len
  return KeyValueState(
    position=jnp.zeros((b,), jnp.int32),
    memory_keys=jnp.zeros((b, g, m, d_k), dtype),
    memory_values=jnp.zeros((b, g, m, d_v), dtype),
    memory_docs=jnp.full((b, m), NO_DOCUMENT, jnp.int32),
  )
