"""`vq_attention`: softmax attention over vector-quantized keys, in linear time.

Read `attention/reference.py` first: it computes the same values in two short functions.

Letters: B batch, T tokens, R blocks, L block length, M memory length, H query heads, G key/value
heads, P = H/G query heads for each of them, S codes, K key width, V value width.

Query i attends each token j <= i of its document (an encoder: each token) with weight softmax_j of

  scale · [(q_i + u)·k̂_j + (q_i + w)·r_{i-j}]    where k̂_j = C_{z_j}, and r_d = 0 for d > M.

Tokens in the window (the block of the query, and the M tokens before it) are attended one by one.
Older tokens are attended through the compressive cache: the n_s tokens of code s act like one token
with key C_s, score scale · (q_i + u)·C_s + log n_s, and their mean value m_s. For quantized keys
this is exact.

The segments of the arguments (`segment_ids`) are called documents (`doc_ids`) in the code.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention import blocking, blockwise, key_values, vq_arguments
from tvq_haiku.attention.block_scores import Queries, SharedKeys
from tvq_haiku.attention.blockwise import BlockOptions
from tvq_haiku.attention.compressive_cache import EMPTY
from tvq_haiku.attention.key_values import KeyValues
from tvq_haiku.attention.state import AttentionState, initial_attention_state
from tvq_haiku.ops import padding
from tvq_haiku.ops.scan import Scan
from tvq_haiku.types import Array

_EMPTY_SLOT = KeyValues(codes=EMPTY, keys=0, values=0, doc_ids=0)  # pads the last block


class AttentionOutput(NamedTuple):
  """Output of `vq_attention`."""

  values: Array  # [B, T, H, V]
  codes: Array  # [B, T, G] int32: the code z of each key
  state: AttentionState | None  # None for an encoder


class _Inputs(NamedTuple):
  """Arguments of `vq_attention`, with all padding at the end of each row."""

  q: Array  # [B, T, H, K]
  k: Array  # [B, T, G, K]
  v: Array  # [B, T, G, V]
  doc_ids: Array  # [B, T] int32: the segment of each token
  n_read: Array  # [B] int32: number of tokens before the padding
  is_padded: bool  # False: n_read is T for all batch elements
  order: Array | None  # [B, T] int32: original index of each token. None: no token has moved


def vq_attention(
  q: Array,
  k: Array,
  v: Array,
  codebook: Array,
  *,
  state: AttentionState | None = None,
  mem_len: int | None = None,
  block_len: int = 256,
  reduction: str = "auto",
  is_causal: bool = True,
  scale: float | None = None,
  relative_keys: Array | None = None,
  content_bias: Array | None = None,
  position_bias: Array | None = None,
  segment_ids: Array | None = None,
  mask: Array | None = None,
  lengths: Array | None = None,
  agg_cache: bool = True,
  grad_thru_cache: bool = True,
  remat: bool = False,
  scan: Scan = jax.lax.scan,
) -> AttentionOutput:
  """Computes softmax attention over quantized keys, in time and memory linear in T.

  The values are those of `tvq_haiku.reference.quadratic_attention`. The shapes of queries, keys and
  values are those of `jax.nn.dot_product_attention`; in addition there is a codebook, and a state
  that carries earlier tokens from call to call.

  Values do not depend on `block_len`, on `reduction`, or on how a sequence is split into calls.
  Gradients depend on `block_len`: a key gets gradients from the queries of its own block and of
  later blocks that start at most M tokens after it; a value gets gradients from all queries that
  attend it. The codebook gets no gradient: update it by moving averages of
  `attention.quantization.code_statistics`. Add `attention.quantization.commit_loss` to the loss, to
  keep keys close to their codes.

  float64 arrays are converted to float32.

  Args:
    q: [B, T, H, K] queries. Head h reads key/value head h // (H/G).
    k: [B, T, G, K] keys, not quantized yet; they get a straight-through gradient.
    v: [B, T, G, V] values.
    codebook: [G, S, K] codes.
    state: the state that an earlier call returned. None: there are no earlier tokens.
    mem_len: M. None: that of `state`, or `block_len` if there is no state.
    block_len: L, the number of consecutive queries that share one window and one cache.
    reduction: how blocks are computed. `scan` computes block by block, in the least memory;
      `serial`, `matmul` and `assoc_scan` compute all blocks at once, and differ in how they merge
      caches (see `compressive_cache.prefixes`); `auto` stands for `fastest_reduction`.
    is_causal: False: an encoder, in which each token attends the tokens before and after it, and
      which has no state.
    scale: factor of all scores, relative bias included. None: K^(-1/2).
    relative_keys: [M+1, G, K] r_d for distances d = 0, ..., M; for an encoder [2M+1, G, K] for
      d = -M, ..., M, where d is the position of the query minus that of the key. None: no bias.
    content_bias: [H, K] u, added to queries in content scores. None: zero.
    position_bias: [H, K] w, added to queries in position scores. None: zero.
    segment_ids: [B, T] int32, not negative: tokens attend only tokens of their own segment. All
      tokens of a segment must be adjacent. None: all tokens continue the last segment of `state`.
    mask: [B, T] bool: False for padding, anywhere in a row. Padding is neither attended nor
      remembered, and its outputs are undefined. None: no padding.
    lengths: [B] int32: number of tokens before the padding at the end of each row. Cheaper than a
      mask, which needs a sort; give only one of them. None: no padding.
    agg_cache: False masks all tokens farther than M from the query.
    grad_thru_cache: False stops the gradients from a block to all tokens outside of it.
    remat: recompute scores (and, if causal, caches) in the backward pass.
    scan: runs loops over blocks: `jax.lax.scan`, or `hk.scan` inside of `hk.transform`.

  Returns:
    values [B, T, H, V] in the dtype of `v` (float32 for float64), codes [B, T, G], and the state
    after the T tokens.

  Raises:
    ValueError: a shape or setting is not allowed; the message names the argument.
    TypeError: a dtype is not allowed.

  >>> q = k = jax.random.normal(jax.random.key(0), (1, 10, 1, 4))
  >>> codebook = jax.random.normal(jax.random.key(1), (1, 8, 4))
  >>> out = vq_attention(q, k, q, codebook, mem_len=3, block_len=3)
  >>> out.values.shape, int(out.state.position[0])
  ((1, 10, 1, 4), 10)

  If every key is a code, the values are those of `jax.nn`, at any length:

  >>> k = codebook.swapaxes(0, 1)[None]  # [1, 8, 1, 4]
  >>> out = vq_attention(k, k, k, codebook, mem_len=2, block_len=2)
  >>> want = jax.nn.dot_product_attention(k, k, k, is_causal=True)
  >>> bool(jnp.allclose(out.values, want, atol=1e-5))
  True
  """
  # 1. Check the arguments.
  segment_ids, mask, lengths = (
    None if x is None else jnp.asarray(x) for x in (segment_ids, mask, lengths)
  )
  dims = vq_arguments.check_arrays(
    q, k, v, codebook, segment_ids, mask, lengths, content_bias, position_bias
  )
  q, k, v, codebook, relative_keys, content_bias, position_bias = vq_arguments.to_single_precision(
    q, k, v, codebook, relative_keys, content_bias, position_bias
  )
  vq_arguments.check_settings(dims, mem_len, block_len, reduction)
  if state is None:
    state = _initial_state(dims, block_len if mem_len is None else mem_len, v.dtype)
  else:
    vq_arguments.check_state(state, dims, mem_len, is_causal)
  M = state.memory_docs.shape[1]
  vq_arguments.check_relative_keys(relative_keys, dims, M, is_causal)
  # 2. Move padding to the end of each row.
  inputs = _compact(q, k, v, segment_ids, mask, lengths, state)
  # 3. Quantize the keys: z_t = argmin_s |k_t - C_s|^2.
  codes, tokens = key_values.quantize(inputs.k, inputs.v, codebook, inputs.doc_ids, inputs.n_read)
  # 4. Lay out scale · (q + u), scale · (q + w) and tokens in R blocks of L tokens.
  L = min(block_len, dims.T)
  scale = dims.K**-0.5 if scale is None else scale
  queries = Queries(
    content=blocking.lay_out_queries(inputs.q, content_bias, scale, dims.G, L),
    position=blocking.lay_out_queries(inputs.q, position_bias, scale, dims.G, L),
  )
  blocks = blocking.pad_tokens(tokens, -dims.T % L, _EMPTY_SLOT)
  shared = _shared_keys(codebook, relative_keys, q.dtype)
  # 5. Attend the window and the cache of each block, and update the state.
  if reduction == "auto":
    reduction = fastest_reduction(queries.content.shape[2], remat=remat)
  options = BlockOptions(reduction, agg_cache, grad_thru_cache, remat, scan)
  memory, cache = key_values.memory_of(state, tokens), key_values.cache_of(state)
  if is_causal:
    values, cache = blockwise.attend_sequence(
      queries, blocks, inputs.n_read, memory, cache, shared, options
    )
    # The last M tokens stay in memory; the cache holds all tokens before them.
    memory = key_values.last_tokens(memory, tokens, inputs.n_read if inputs.is_padded else None)
    state = key_values.next_state(state, inputs.n_read, memory, cache)
  else:  # nothing precedes or follows the tokens: memory and cache are empty
    values = blockwise.attend_both_sides(queries, blocks, memory, cache, shared, options)
    state = None
  # 6. Return to the caller's layout.
  values = blocking.restore_layout(values, dims.T)
  if inputs.order is not None:
    original = jnp.argsort(inputs.order, axis=1)
    values, codes = padding.reorder(values, original), padding.reorder(codes, original)
  return AttentionOutput(values, codes, state)


def _compact(
  q: Array,
  k: Array,
  v: Array,
  segment_ids: Array | None,
  mask: Array | None,
  lengths: Array | None,
  state: AttentionState,
) -> _Inputs:
  """Moves padding to the end of each row, and fills in missing segment ids."""
  B, T = q.shape[:2]
  order = None
  if mask is not None:
    order = jnp.argsort(~mask, axis=1, stable=True)
    lengths = jnp.sum(mask, axis=1)
    q, k, v = (padding.reorder(x, order) for x in (q, k, v))
    segment_ids = None if segment_ids is None else padding.reorder(segment_ids, order)
  if segment_ids is None:
    segment_ids = key_values.continued_doc_ids(state, T)
  segment_ids = segment_ids.astype(jnp.int32)
  n_read = jnp.full((B,), T) if lengths is None else jnp.clip(lengths, 0, T)
  return _Inputs(q, k, v, segment_ids, n_read.astype(jnp.int32), lengths is not None, order)


def _initial_state(dims: chex.Dimensions, mem_len: int, dtype: jnp.dtype) -> AttentionState:
  """Returns the state before the first token."""
  return initial_attention_state(
    batch_size=dims.B,
    n_kv_head=dims.G,
    n_code=dims.S,
    mem_len=mem_len,
    d_k=dims.K,
    d_v=dims.V,
    dtype=dtype,
  )


def fastest_reduction(n_block: int, *, remat: bool) -> str:
  """Returns the reduction that `auto` stands for.

  On a CPU, as measured in `experiments/benchmarks/results/*_cpu.json`, the triangular product is
  slightly faster up to 8 blocks, and the serial merge, whose cost is linear, beyond. With
  rematerialization it is `scan`, which keeps the least. Accelerators have not been measured: there
  it is the reduction without a loop that needs fewer operations.

  Args:
    n_block: R.
    remat: whether scores are recomputed in the backward pass.
  """
  if remat:
    return "scan"
  if jax.default_backend() == "cpu":
    return "matmul" if n_block <= 8 else "serial"
  return "matmul" if n_block <= 32 else "assoc_scan"


def _shared_keys(codebook: Array, relative_keys: Array | None, dtype: jnp.dtype) -> SharedKeys:
  """Returns the codebook, and the relative keys [G, M+1, K] in the order r_M, ..., r_0."""
  codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))
  if relative_keys is None:
    return SharedKeys(codebook, None)
  # The window lists its keys oldest first, so distances fall from left to right.
  return SharedKeys(codebook, jnp.flip(relative_keys, axis=0).astype(dtype).swapaxes(0, 1))
