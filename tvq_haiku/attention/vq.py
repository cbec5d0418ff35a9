"""Softmax attention over vector-quantized keys in linear time: the algorithm, as a pure function.

Letters: B batch, T tokens, R blocks, L block length, M memory length, H query heads, G key/value
heads, P = H/G query heads a group, S codes, K key width, V value width.

Query i attends every earlier token j of its document with weight softmax_j of
  (q_i + u)·k̂_j + (q_i + v)·r_{i-j}     where k̂_j = C_{z_j}, and r_d = 0 for d > M.
Tokens in the window (the M before a block, and the block) are attended one by one. Of older ones
only the code enters the score, so the n_s of them that share code s act together as one key C_s
with logit (q_i + u)·C_s + log n_s and their mean value m_s (`cache`). That is exact for quantized
keys. The encoder (`is_causal=False`) mirrors all of it: M tokens after a block are in its window
too, and a second cache holds what comes after them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.attention import block_scores, blocking, compressive_cache, quantization
from tvq_haiku.attention.block_scores import Queries, SharedKeys
from tvq_haiku.attention.blocking import KeyValues
from tvq_haiku.attention.compressive_cache import Cache
from tvq_haiku.attention.state import AttentionState, initial_attention_state
from tvq_haiku.config import REDUCTIONS
from tvq_haiku.ops import padding
from tvq_haiku.types import Array
from tvq_haiku.utils import checks


class AttentionOutput(NamedTuple):
  """What `vq_attention` returns."""

  values: Array  # [B, T, H, V]
  codes: Array  # [B, T, G] int32: z
  state: AttentionState | None  # None from an encoder


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
) -> AttentionOutput:
  """Softmax attention over quantized keys, in time and memory linear in T.

  Shapes and names are those of `jax.nn.dot_product_attention`, with a codebook, and with a state
  in place of keys that are already known. Values depend on neither `block_len` nor `reduction`,
  nor on how a sequence is cut into calls. Gradients depend on `block_len`: a key gets one from the
  queries of its own block and of those that follow within M, a value from all queries after it.
  The codebook gets none: let it follow its keys, by a moving average of
  `quantizer.code_statistics`, with `quantizer.commit_loss` to hold keys to their codes. There
  is no forward-mode derivative.

  Args:
    q: [B, T, H, K] queries. Head h reads key/value head h // (H/G).
    k: [B, T, G, K] keys; they are quantized here, and get a straight-through gradient.
    v: [B, T, G, V] values.
    codebook: [G, S, K] codes; they get no gradient.
    state: what was read before, from an earlier call. None: nothing.
    mem_len: M, when there is no `state` to tell it; None: `block_len`.
    block_len: L; so many tokens attend together, over one window and one cache.
    reduction: `scan` takes block by block, in the least memory; `serial`, `matmul` and
      `assoc_scan` take all at once, and differ in how they sum up the caches of the blocks;
      `auto` is what was fastest where it was measured, on CPUs.
    is_causal: False is an encoder: every token attends those before and after it, without state.
    scale: of all scores, bias included; None: K^(-1/2).
    relative_keys: [M+1, G, K] r_d for distances d = 0, ..., M; for an encoder [2M+1, G, K] for
      d = -M, ..., M, where d is the query's place less the key's. None: no relative bias.
    content_bias: [H, K] u; None: zero.
    position_bias: [H, K] v; None: zero.
    segment_ids: [B, T] int32, not negative (for padding there is `mask`): tokens attend only
      tokens of their own segment.
      Segments are contiguous; an id must not come back after another one. None: all tokens
      continue the last segment of the state.
    mask: [B, T] bool: False for padding, anywhere in a row. It is neither attended nor
      remembered, and its own outputs mean nothing. None: no padding.
    lengths: [B] int32, instead of a mask if all padding is at the end of its row: the number of
      tokens before it.
    agg_cache: False masks every token farther away than M.
    grad_thru_cache: False stops all gradients where a block begins.
    remat: recompute scores (for `scan`, also caches) in the backward pass instead of keeping them.

  Returns:
    values [B, T, H, V] in the dtype of `v`, codes [B, T, G], and the state after the T tokens.

  Raises:
    ValueError or TypeError: shapes, types or settings that do not fit; the message names them.

  >>> q = k = jax.random.normal(jax.random.key(0), (1, 10, 1, 4))
  >>> codebook = jax.random.normal(jax.random.key(1), (1, 8, 4))
  >>> out = vq_attention(q, k, q, codebook, mem_len=3, block_len=3)
  >>> out.values.shape, int(out.state.position[0])
  ((1, 10, 1, 4), 10)

  Keys that are codes make it the attention of `jax.nn`, at any length:

  >>> k = codebook.swapaxes(0, 1)[None]  # [1, 8, 1, 4]
  >>> out = vq_attention(k, k, k, codebook, mem_len=2, block_len=2)
  >>> bool(jnp.allclose(out.values, jax.nn.dot_product_attention(k, k, k, is_causal=True), atol=1e-5))
  True
  """
  segment_ids, mask, lengths = (
    None if x is None else jnp.asarray(x) for x in (segment_ids, mask, lengths)
  )
  real = jnp.floating
  sizes = checks.check_arrays(
    "vq_attention",
    {},
    {
      "q": (q, "B T H K", real),
      "k": (k, "B T G K", real),
      "v": (v, "B T G V", real),
      "codebook": (codebook, "G S K", real),
      "segment_ids": (segment_ids, "B T", jnp.integer),
      "mask": (mask, "B T", jnp.bool),
      "lengths": (lengths, "B", jnp.integer),
      "content_bias": (content_bias, "H K", real),
      "position_bias": (position_bias, "H K", real),
    },
  )
  B, T, H, K, G, S, V = (sizes[letter] for letter in "BTHKGSV")
  checks.check_heads("vq_attention", H, G)
  M = block_len if mem_len is None else mem_len
  for name, n in (("block_len", block_len), ("mem_len", M), ("T", T)):
    if not isinstance(n, (int, np.integer)) or n < 1:
      raise ValueError(f"vq_attention: {name}={n!r} must be a whole number, at least 1.")
  if reduction not in REDUCTIONS:
    raise ValueError(f"vq_attention: reduction={reduction!r} must be one of {REDUCTIONS}.")
  if state is None:
    state = initial_attention_state(
      batch_size=B, n_kv_head=G, n_code=S, mem_len=M, d_k=K, d_v=V, dtype=v.dtype
    )
  elif not is_causal:
    raise ValueError("vq_attention: an encoder (is_causal=False) has no state.")
  elif not isinstance(state, AttentionState):
    raise TypeError(f"vq_attention: state must be an AttentionState, got {type(state).__name__}.")
  elif mem_len not in (None, M := state.memory_docs.shape[-1]):
    raise ValueError(f"vq_attention: mem_len={mem_len}, but the state remembers {M}.")
  distances = "M+1" if is_causal else "2M+1"
  checks.check_arrays(
    "vq_attention",
    sizes | {"M": M, "M+1": M + 1, "2M+1": 2 * M + 1},
    {
      "state.memory_keys": (state.memory_keys, "B G M K", real),
      "state.memory_values": (state.memory_values, "B G M V", real),
      "state.cache_means": (state.cache_means, "B G S V", real),
      "relative_keys": (relative_keys, f"{distances} G K", real),
    },
  )
  order = None
  if mask is not None:
    if lengths is not None:
      raise ValueError("vq_attention: give a mask or lengths, not both.")
    order = jnp.argsort(~mask, axis=1, stable=True)  # padding goes to the end of its row
    q, k, v, segment_ids = (
      None if x is None else padding.reorder(x, order) for x in (q, k, v, segment_ids)
    )
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)

  # 1. Quantize, and lay everything out by key/value head.
  codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))
  codes = quantization.nearest_codes(k, codebook)
  k_hat = quantization.straight_through(
    k.astype(jnp.float32), quantization.look_up(codes, codebook)
  )
  lengths = None if lengths is None else jnp.clip(lengths, 0, T).astype(jnp.int32)
  n_read = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
  if segment_ids is None:
    segment_ids = jnp.broadcast_to(jnp.maximum(state.memory_docs[:, -1:], 0), (B, T))
  sequence = KeyValues(
    jnp.where((jnp.arange(T) < n_read[:, None])[:, None], codes.swapaxes(1, 2), S),
    k_hat.swapaxes(1, 2),
    v.swapaxes(1, 2),
    segment_ids[:, None],
  )
  memory = KeyValues(
    state.memory_codes,
    state.memory_keys,
    state.memory_values.astype(v.dtype),
    state.memory_docs[:, None],
  )
  cache = Cache(
    state.cache_counts[:, :, None], state.cache_means[:, :, None], state.cache_doc[:, None, None]
  )
  if relative_keys is not None:
    relative_keys = jnp.flip(relative_keys, axis=0).astype(q.dtype).swapaxes(0, 1)
  keys = SharedKeys(codebook, relative_keys)

  # 2. Cut into R blocks of L, and attend.
  L = min(block_len, T)
  R = -(-T // L)
  row = blocking.pad_tokens(sequence, R * L - T, KeyValues(S, 0, 0, 0))
  scale = K**-0.5 if scale is None else scale
  queries = Queries(
    blocking.lay_out_queries(q, content_bias, scale, G, L),
    blocking.lay_out_queries(q, position_bias, scale, G, L),
  )
  if reduction == "auto":
    reduction = fastest_reduction(R, remat=remat)
  settings = dict(agg_cache=agg_cache, grad_thru_cache=grad_thru_cache, reduction=reduction)
  if is_causal:
    values, cache = _causal(queries, row, memory, cache, n_read, keys, remat=remat, **settings)
  else:
    values = _encoder(queries, row, memory, cache, keys, remat=remat, **settings)
  values = blocking.restore_layout(values, L, T)
  if order is not None:
    back = jnp.argsort(order, axis=1)
    values, codes = padding.reorder(values, back), padding.reorder(codes, back)
  if not is_causal:
    return AttentionOutput(values, codes, None)

  # 3. Remember.
  memory = blocking.last_tokens(memory, sequence, lengths)
  state = AttentionState(
    state.position + n_read,
    memory.codes,
    memory.keys,
    memory.values.astype(state.memory_values.dtype),
    memory.docs[:, 0],
    cache.counts[:, :, 0],
    cache.means[:, :, 0],
    cache.doc[:, 0, 0],
  )
  return AttentionOutput(values, codes, state)


def fastest_reduction(n_block: int, *, remat: bool) -> str:
  """What `auto` stands for, by the rows of `experiments/benchmarks/results/*_cpu.json`.

  On a CPU the triangular product leads by a little up to 8 blocks, the serial sum beyond, whose
  cost is linear; what is computed again is best computed block by block. Accelerators have not
  been measured: there the choice between those that need no loop is by the number of operations.
  """
  if remat:
    return "scan"
  if jax.default_backend() == "cpu":
    return "matmul" if n_block <= 8 else "serial"
  return "matmul" if n_block <= 32 else "assoc_scan"


def _causal(
  queries: Queries,
  row: KeyValues,
  memory: KeyValues,
  cache: Cache,
  n_read: Array,
  keys: SharedKeys,
  *,
  agg_cache: bool,
  grad_thru_cache: bool,
  reduction: str,
  remat: bool,
) -> tuple[Array, Cache]:
  """Values [B, G, R, A, V] of R blocks, and the cache after them."""
  R = queries.content.shape[2]
  L = row.docs.shape[2] // R
  M, S = memory.docs.shape[2], keys.codebook.shape[1]
  # In the row (memory, tokens) the M slots from `n_read` on stay in memory for good, so the
  # cache after them must not hold them. Only padding would have seen them there.
  leaves = jnp.arange(R * L) < n_read[:, None, None]  # [B, 1, R·L]

  def attend(carry: tuple[KeyValues, Cache], group: tuple[Queries, KeyValues, Array]):
    queries, tokens, leaves = group
    n_block = queries.content.shape[2]
    memory, cache = carry
    row = blocking.concatenate(memory, tokens)
    leaving = blocking.split_blocks(blocking.slice_tokens(row, 0, n_block * L), n_block)
    codes = jnp.where(blocking.split_blocks(leaves, n_block), leaving.codes, S)
    chunks = compressive_cache.summarize(codes, leaving.values, leaving.docs, S)
    every = compressive_cache.prefixes(
      cache, chunks, "serial" if reduction == "scan" else reduction
    )
    before = blocking.preceding_windows(row, M, n_block, L)
    past = blocking.slice_tokens(every, 0, n_block)
    if not grad_thru_cache:
      before, past = jax.lax.stop_gradient((before, past))
    values = block_scores.attend(
      queries, (before, blocking.split_blocks(tokens, n_block)), (past,), keys, agg_cache=agg_cache
    )
    carry = (
      blocking.slice_tokens(row, n_block * L, n_block * L + M),
      blocking.slice_tokens(every, n_block, n_block + 1),
    )
    return carry if grad_thru_cache else jax.lax.stop_gradient(carry), values

  group = (queries, row, leaves)
  if reduction == "scan":
    (_, cache), values = blocking.scan_blocks(attend, (memory, cache), group, R, remat=remat)
  else:
    attend = jax.checkpoint(attend) if remat else attend
    (_, cache), values = attend((memory, cache), group)
  return values, cache


def _encoder(
  queries: Queries,
  row: KeyValues,
  empty: KeyValues,
  cache: Cache,
  keys: SharedKeys,
  *,
  agg_cache: bool,
  grad_thru_cache: bool,
  reduction: str,
  remat: bool,
) -> Array:
  """Values [B, G, R, A, V] of R blocks that see what is before and after them."""
  R = queries.content.shape[2]
  L = row.docs.shape[2] // R
  M, S = empty.docs.shape[2], keys.codebook.shape[1]

  def side(row: KeyValues) -> tuple[KeyValues, Cache]:
    row = blocking.concatenate(empty, row)
    chunks = blocking.split_blocks(blocking.slice_tokens(row, 0, R * L), R)
    chunks = compressive_cache.summarize(chunks.codes, chunks.values, chunks.docs, S)
    every = compressive_cache.prefixes(
      cache, chunks, "serial" if reduction == "scan" else reduction
    )
    near, far = blocking.preceding_windows(row, M, R, L), blocking.slice_tokens(every, 0, R)
    return (near, far) if grad_thru_cache else jax.lax.stop_gradient((near, far))

  def attend(carry: None, group: tuple[Any, ...]):
    queries, before, own, after, past, future = group
    return carry, block_scores.attend(
      queries, (before, own, after), (past, future), keys, agg_cache=agg_cache
    )

  # What follows a block is what precedes it in the row read backwards.
  before, past = side(row)
  after, future = blocking.reverse(side(blocking.reverse(row)))
  after = jax.tree.map(lambda x: jnp.flip(x, axis=3), after)
  group = (queries, before, blocking.split_blocks(row, R), after, past, future)
  if reduction == "scan":
    return blocking.scan_blocks(attend, None, group, R, remat=remat)[1]
  return (jax.checkpoint(attend) if remat else attend)(None, group)[1]
