"""Quadratic attention over plain keys: the baseline for attention over quantized keys.

Query i attends each token j of its document with 0 <= i-j <= M, with weight softmax_j of

  scale · [(q_i + u)·k_j + (q_i + w)·r_{i-j}].

Letters: B batch, T tokens, R query blocks, L block length, C tile length, M memory length, H query
heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax.numpy as jnp

from tvq_haiku.attention import blocking, key_values, tiled
from tvq_haiku.attention.compressive_cache import NO_DOCUMENT
from tvq_haiku.attention.key_values import KeyValues
from tvq_haiku.attention.state import KeyValueState
from tvq_haiku.attention.tiled import TileKeys, TileLayout, TileQueries
from tvq_haiku.types import Array
from tvq_haiku.utils import checks


class FullOutput(NamedTuple):
  """Output of `full_attention`."""

  values: Array  # [B, T, H, V]
  state: KeyValueState | None  # None for an encoder


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
  """Computes softmax attention over plain keys, in quadratic time and linear memory.

  Args:
    q: [B, T, H, K] queries. Head h reads key/value head h // (H/G).
    k: [B, T, G, K] keys.
    v: [B, T, G, V] values.
    state: the state that an earlier call returned, or `initial_key_value_state`. An encoder attends
      all T tokens of the call, and no others; its state only gives M, the longest distance with a
      relative bias.
    block_len: L; values do not depend on it.
    is_causal: False: an encoder, in which each token attends the tokens before and after it.
    scale: factor of all scores, relative bias included. None: K^(-1/2).
    relative_keys: [M+1, G, K], or [2M+1, G, K] for an encoder; as in `vq_attention`.
    content_bias: [H, K] u. None: zero.
    position_bias: [H, K] w. None: zero.
    segment_ids: [B, T] int32, not negative: tokens attend only tokens of their own segment. None:
      all tokens continue the last segment of `state`.
    lengths: [B] int32: number of tokens before the padding at the end of each row. None: T.

  Returns:
    values [B, T, H, V] in the dtype of `v`, and the state after the T tokens.

  Raises:
    ValueError: a shape is not allowed; the message names the argument.
    TypeError: a dtype is not allowed.

  >>> import jax
  >>> from tvq_haiku.attention.state import initial_key_value_state
  >>> q = jax.random.normal(jax.random.key(0), (1, 10, 2, 4))
  >>> state = initial_key_value_state(batch_size=1, n_kv_head=2, mem_len=10, d_k=4, d_v=4)
  >>> out = full_attention(q, q, q, state=state, block_len=3)
  >>> want = jax.nn.dot_product_attention(q, q, q, is_causal=True)
  >>> bool(jnp.allclose(out.values, want, atol=1e-5))
  True
  """
  # 1. Check the arguments.
  dims = _check_arrays(
    q, k, v, state, relative_keys, content_bias, position_bias, segment_ids, lengths, is_causal
  )
  if segment_ids is None:
    segment_ids = key_values.continued_doc_ids(state, dims.T)
  segment_ids = jnp.asarray(segment_ids, jnp.int32)
  n_read = jnp.full((dims.B,), dims.T) if lengths is None else lengths
  n_read = n_read.astype(jnp.int32)
  scale = dims.K**-0.5 if scale is None else scale

  # 2. Lay out keys and values by head, and queries in R blocks of L.
  L = min(block_len, dims.T)
  tokens = key_values.lay_out(k, v, segment_ids, n_read)
  memory = key_values.memory_of(state, tokens)
  q_u, q_w = (  # scale · (q + u) and scale · (q + w) [R, B, G, P, L, K]
    jnp.moveaxis(blocking.lay_out_queries(q, bias, scale, dims.G, L), 2, 0)
    for bias in (content_bias, position_bias)
  )
  query_docs = blocking.pad_tokens(tokens.doc_ids, -dims.T % L, NO_DOCUMENT)
  query_docs = query_docs.reshape(dims.B, -1, L).swapaxes(0, 1)  # [R, B, L]
  queries = TileQueries(q_u, q_w, query_docs)

  # 3. Attend, tile by tile.
  C = max(2 * L, min(2 * block_len, dims.M))  # many keys in a tile even if there are few queries
  keys = blocking.concatenate(memory, tokens) if is_causal else tokens
  layout, keys = _lay_out_keys(keys, relative_keys, q.dtype, L, C, dims.M if is_causal else None)
  values = tiled.tiled_attention(layout, queries, keys)
  values = blocking.restore_layout(jnp.moveaxis(values, 0, 2), dims.T)
  if not is_causal:
    return FullOutput(values, None)

  # 4. Update the state: the last M tokens.
  memory = key_values.last_tokens(memory, tokens, lengths)
  return FullOutput(values, key_values.next_state(state, n_read, memory))


def _check_arrays(
  q: Array,
  k: Array,
  v: Array,
  state: KeyValueState,
  relative_keys: Array | None,
  content_bias: Array | None,
  position_bias: Array | None,
  segment_ids: Array | None,
  lengths: Array | None,
  is_causal: bool,
) -> chex.Dimensions:
  """Returns the sizes B, T, H, K, G, V and M; raises if the arrays do not fit together."""
  dims = chex.Dimensions(M=state.memory_docs.shape[1])
  n_distance = ("M+1", dims.M + 1) if is_causal else ("2M+1", 2 * dims.M + 1)
  real = jnp.floating
  arrays = {
    "q": (q, "BTHK", real),
    "k": (k, "BTGK", real),
    "v": (v, "BTGV", real),
    "state.memory_keys": (state.memory_keys, "BGMK", real),
    "relative_keys": (relative_keys, (n_distance, "G", "K"), real),
    "content_bias": (content_bias, "HK", real),
    "position_bias": (position_bias, "HK", real),
    "segment_ids": (segment_ids, "BT", jnp.integer),
    "lengths": (lengths, "B", jnp.integer),
  }
  checks.check_arrays("full_attention", dims, **arrays)
  checks.check_heads("full_attention", dims.H, dims.G)
  return dims


def _lay_out_keys(
  keys: KeyValues,
  relative_keys: Array | None,
  dtype: jnp.dtype,
  block_len: int,
  tile_len: int,
  mem_len: int | None,
) -> tuple[TileLayout, TileKeys]:
  """Pads keys to a multiple of C, and relative keys with zeros on both sides.

  Args:
    keys: of all tokens, the memory included.
    relative_keys: [M+1, G, K], or [2M+1, G, K] for an encoder, or None.
    dtype: of the relative keys.
    block_len: L.
    tile_len: C.
    mem_len: M; None for an encoder.

  Returns:
    The layout of the tiles, and the padded keys.
  """
  G, K = keys.keys.shape[1], keys.keys.shape[-1]
  keys = blocking.pad_tokens(
    keys, -keys.doc_ids.shape[2] % tile_len, KeyValues(None, 0, 0, NO_DOCUMENT)
  )
  if relative_keys is None:
    relative_keys = jnp.zeros((1, G, K), dtype)
  # The zeros give distances without a relative key the bias zero. There are enough of them for any
  # tile that overlaps the relative keys.
  n_zero = block_len + tile_len
  relative = jnp.flip(relative_keys, axis=0).astype(dtype).swapaxes(0, 1)  # r_M first
  relative = jnp.pad(relative, ((0, 0), (n_zero, n_zero), (0, 0)))
  center = n_zero + (0 if mem_len is not None else relative_keys.shape[0] // 2)
  layout = TileLayout(block_len, tile_len, mem_len, center)
  return layout, TileKeys(keys.keys, keys.values, relative, keys.doc_ids[:, 0])
