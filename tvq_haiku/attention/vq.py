"""`vq_attention`: softmax attention over vector-quantized keys, in linear time.

Read `attention/reference.py` first: it computes the same values in two short functions.

Letters: B batch, T tokens, R blocks, L block length, M memory length, H query heads, G key/value
heads, P = H/G query heads for each of them, S codes, K key width, V value width.

Query i attends each earlier token j of its document with weight softmax_j of

  (q_i + u)·k̂_j + (q_i + w)·r_{i-j}    where k̂_j = C_{z_j}, and r_d = 0 for d > M.

Tokens in the window (the M tokens before a block, and the block) are attended one by one. Older
tokens enter through the compressive cache: the n_s tokens of code s act together, like one key C_s
with logit (q_i + u)·C_s + log n_s and their mean value m_s. For quantized keys this is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.attention import blocking, blockwise, key_values
from tvq_haiku.attention.block_scores import Queries, SharedKeys
from tvq_haiku.attention.compressive_cache import EMPTY
from tvq_haiku.attention.key_values import KeyValues
from tvq_haiku.attention.state import AttentionState, initial_attention_state
from tvq_haiku.config import REDUCTIONS
from tvq_haiku.ops import padding
from tvq_haiku.ops.scan import Scan
from tvq_haiku.types import Array
from tvq_haiku.utils import checks


class AttentionOutput(NamedTuple):
  """What `vq_attention` returns."""

  values: Array  # [B, T, H, V]
  codes: Array  # [B, T, G] int32: the code z of each key
  state: AttentionState | None  # None for an encoder


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

  The values are those of `tvq_haiku.reference.quadratic_attention`, which is the first file to
  read. Shapes and names are those of `jax.nn.dot_product_attention`, plus a codebook, and a state
  that carries earlier tokens from call to call.

  Values depend neither on `block_len` and `reduction`, nor on how a sequence is split into calls.
  Gradients depend on `block_len`: a key gets gradients from the queries of its own block and from
  those that follow within M; a value gets them from all queries after it. The codebook gets no
  gradient. Update it by a moving average of `attention.quantization.code_statistics`, and add
  `attention.quantization.commit_loss` to the loss, to keep keys close to their codes. There is no
  forward-mode derivative.

  Args:
    q: [B, T, H, K] queries. Head h reads key/value head h // (H/G).
    k: [B, T, G, K] keys. They are quantized here, and get a straight-through gradient.
    v: [B, T, G, V] values.
    codebook: [G, S, K] codes.
    state: the state that an earlier call returned. None: there are no earlier tokens.
    mem_len: M. None: that of `state`, or `block_len` if there is no state.
    block_len: L, the number of tokens that are attended together, with one window and one cache.
    reduction: how blocks are computed. `scan` computes block by block, in the least memory;
      `serial`, `matmul` and `assoc_scan` compute all at once, and differ in how they merge the
      caches of the blocks; `auto` chooses by `fastest_reduction`.
    is_causal: False is an encoder: each token attends those before and after it; no state.
    scale: factor of all scores, relative bias included. None: K^(-1/2).
    relative_keys: [M+1, G, K] r_d for distances d = 0, ..., M; for an encoder [2M+1, G, K] for
      d = -M, ..., M, where d is the position of the query minus that of the key. None: no bias.
    content_bias: [H, K] u, added to queries in content scores. None: zero.
    position_bias: [H, K] w, added to queries in position scores. None: zero.
    segment_ids: [B, T] int32, not negative: tokens attend only tokens of their own segment. All
      tokens of a segment must be adjacent. None: all tokens continue the last segment of `state`.
    mask: [B, T] bool: False for padding, anywhere in a row. Padding is neither attended nor
      remembered, and its outputs are undefined. None: no padding.
    lengths: [B] int32: number of tokens before the padding at the end of each row. It may be given
      in place of a mask, which costs a sort. None: no padding.
    agg_cache: False masks all tokens farther than M from the query.
    grad_thru_cache: False stops all gradients at the start of each block.
    remat: recompute scores (and, for `scan`, caches) in the backward pass.
    scan: runs loops over blocks: `jax.lax.scan`, or `hk.scan` inside of `hk.transform`.

  Returns:
    values [B, T, H, V] in the dtype of `v`, codes [B, T, G], and the state after the T tokens.

  Raises:
    ValueError: a shape or setting does not fit; the message names the argument.
    TypeError: a dtype does not fit.

  >>> q = k = jax.random.normal(jax.random.key(0), (1, 10, 1, 4))
  >>> codebook = jax.random.normal(jax.random.key(1), (1, 8, 4))
  >>> out = vq_attention(q, k, q, codebook, mem_len=3, block_len=3)
  >>> out.values.shape, int(out.state.position[0])
  ((1, 10, 1, 4), 10)

  With keys that are codes it is the attention of `jax.nn`, at any length:

  >>> k = codebook.swapaxes(0, 1)[None]  # [1, 8, 1, 4]
  >>> out = vq_attention(k, k, k, codebook, mem_len=2, block_len=2)
  >>> want = jax.nn.dot_product_attention(k, k, k, is_causal=True)
  >>> bool(jnp.allclose(out.values, want, atol=1e-5))
  True
  """
  # 1. Check the arguments, and fill in what was left out.
  segment_ids, mask, lengths = (
    None if x is None else jnp.asarray(x) for x in (segment_ids, mask, lengths)
  )
  dims = _check_arrays(q, k, v, codebook, segment_ids, mask, lengths, content_bias, position_bias)
  _check_settings(dims, mem_len, block_len, reduction)
  if state is None:
    state = _empty_state(dims, block_len if mem_len is None else mem_len, v.dtype)
  else:
    _check_state(state, dims, mem_len, is_causal)
  M = state.memory_docs.shape[1]
  _check_relative_keys(relative_keys, dims, M, is_causal)
  order = None
  if mask is not None:  # padding moves to the end of its row, and back in step 6
    q, k, v, segment_ids, lengths, order = _padding_last(q, k, v, segment_ids, mask)
  if segment_ids is None:
    segment_ids = key_values.continued_doc_ids(state, dims.T)
  n_read = jnp.full((dims.B,), dims.T) if lengths is None else jnp.clip(lengths, 0, dims.T)
  n_read = n_read.astype(jnp.int32)

  # 2. Quantize the keys: z_t = argmin_s |k_t - C_s|^2.
  codes, tokens = key_values.quantized(k, v, codebook, segment_ids, n_read)

  # 3. Lay out queries and tokens in R blocks of L.
  L = min(block_len, dims.T)
  padded = blocking.pad_tokens(tokens, -dims.T % L, KeyValues(EMPTY, 0, 0, 0))
  scale = dims.K**-0.5 if scale is None else scale
  queries = Queries(
    *(blocking.lay_out_queries(q, bias, scale, dims.G, L) for bias in (content_bias, position_bias))
  )
  shared = _shared_keys(codebook, relative_keys, q.dtype)

  # 4. Attend window and cache of every block.
  if reduction == "auto":
    reduction = fastest_reduction(queries.content.shape[2], remat=remat)
  options = blockwise.BlockOptions(reduction, agg_cache, grad_thru_cache, remat, scan)
  memory, cache = key_values.memory(state, tokens), key_values.cache(state)
  if is_causal:
    values, cache = blockwise.attend_sequence(
      queries, padded, n_read, memory, cache, shared, options
    )
  else:
    values = blockwise.attend_both_sides(queries, padded, shared, options, mem_len=M)

  # 5. Remember the last M tokens, and the cache of all before them.
  after = None
  if is_causal:
    memory = key_values.last_tokens(memory, tokens, None if lengths is None else n_read)
    after = key_values.next_state(state, n_read, memory, cache)

  # 6. Return the caller's layout.
  values = blocking.restore_layout(values, dims.T)
  if order is not None:
    back = jnp.argsort(order, axis=1)
    values, codes = padding.reorder(values, back), padding.reorder(codes, back)
  return AttentionOutput(values, codes, after)


def fastest_reduction(n_block: int, *, remat: bool) -> str:
  """Returns the reduction that `auto` stands for.

  On a CPU, as measured in `experiments/benchmarks/results/*_cpu.json`, the triangular product is
  slightly faster up to 8 blocks, and the serial merge, whose cost is linear, beyond. What is
  rematerialized is best computed block by block. Accelerators have not been measured: there the
  choice, between reductions without a loop, is by the number of operations.

  Args:
    n_block: R.
    remat: whether scores are recomputed in the backward pass.
  """
  if remat:
    return "scan"
  if jax.default_backend() == "cpu":
    return "matmul" if n_block <= 8 else "serial"
  return "matmul" if n_block <= 32 else "assoc_scan"


def _check_arrays(
  q, k, v, codebook, segment_ids, mask, lengths, content_bias, position_bias
) -> chex.Dimensions:
  """Returns the sizes of B, T, H, K, G, V and S; raises if the arrays do not fit together."""
  real, dims = jnp.floating, chex.Dimensions()
  checks.check_arrays(
    "vq_attention",
    dims,
    q=(q, "BTHK", real),
    k=(k, "BTGK", real),
    v=(v, "BTGV", real),
    codebook=(codebook, "GSK", real),
    segment_ids=(segment_ids, "BT", jnp.integer),
    mask=(mask, "BT", jnp.bool),
    lengths=(lengths, "B", jnp.integer),
    content_bias=(content_bias, "HK", real),
    position_bias=(position_bias, "HK", real),
  )
  checks.check_heads("vq_attention", dims.H, dims.G)
  if mask is not None and lengths is not None:
    raise ValueError("vq_attention: give a mask or lengths, not both.")
  return dims


def _check_settings(
  dims: chex.Dimensions, mem_len: int | None, block_len: int, reduction: str
) -> None:
  """Raises a ValueError if a size or setting is out of range."""
  for name, n in (("T", dims.T), ("block_len", block_len), ("mem_len", mem_len)):
    if n is not None and (not isinstance(n, (int, np.integer)) or n < 1):
      raise ValueError(f"vq_attention: {name}={n!r} must be an integer, at least 1.")
  if reduction not in REDUCTIONS:
    raise ValueError(f"vq_attention: reduction={reduction!r} must be one of {REDUCTIONS}.")


def _empty_state(dims: chex.Dimensions, mem_len: int, dtype: jnp.dtype) -> AttentionState:
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


def _check_state(
  state: AttentionState, dims: chex.Dimensions, mem_len: int | None, is_causal: bool
) -> None:
  """Raises unless the state fits the arrays and settings."""
  if not is_causal:
    raise ValueError("vq_attention: an encoder (is_causal=False) takes no state.")
  if not isinstance(state, AttentionState):
    message = f"state must be an AttentionState, got {type(state).__name__}."
    raise TypeError(f"vq_attention: {message}")
  M = state.memory_docs.shape[-1]
  if mem_len not in (None, M):
    raise ValueError(f"vq_attention: mem_len={mem_len}, but the state has M={M}.")
  real, dims.M = jnp.floating, M
  fields = {
    "state.memory_keys": (state.memory_keys, "BGMK", real),
    "state.memory_values": (state.memory_values, "BGMV", real),
    "state.cache_means": (state.cache_means, "BGSV", real),
  }
  checks.check_arrays("vq_attention", dims, **fields)


def _check_relative_keys(
  relative_keys: Array | None, dims: chex.Dimensions, mem_len: int, is_causal: bool
) -> None:
  """Raises unless there is one relative key for each distance in reach."""
  n_distance = mem_len + 1 if is_causal else 2 * mem_len + 1
  axes = (n_distance, "G", "K")
  checks.check_arrays("vq_attention", dims, relative_keys=(relative_keys, axes, jnp.floating))


def _padding_last(q: Array, k: Array, v: Array, segment_ids: Array | None, mask: Array):
  """Returns the arrays with the padding at the end of each row, the lengths, and the order."""
  order = jnp.argsort(~mask, axis=1, stable=True)
  q, k, v, segment_ids = (
    None if x is None else padding.reorder(x, order) for x in (q, k, v, segment_ids)
  )
  return q, k, v, segment_ids, jnp.sum(mask, axis=1, dtype=jnp.int32), order


def _shared_keys(codebook: Array, relative_keys: Array | None, dtype: jnp.dtype) -> SharedKeys:
  """Returns codebook and relative keys by head; relative keys in the order of the window."""
  codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))
  if relative_keys is None:
    return SharedKeys(codebook, None)
  # From distance 0, 1, ... to that of the window's keys, oldest first: M, M-1, ...
  return SharedKeys(codebook, jnp.flip(relative_keys, axis=0).astype(dtype).swapaxes(0, 1))
