"""Attention on a mesh: each device attends for its rows, its heads, its width, its piece of a sequence.

Letters: B batch, T tokens, H query heads, G key/value heads, S codes, M memory length, K key width,
V value width.

Rows, heads and values need nothing of each other. Along the axis `sequence`, device d holds the d-th
of n consecutive pieces of T/n tokens. It gets
  - the M tokens before its piece from its neighbour,
  - the cache of what is farther back by an associative scan over the devices: each summarises the
    T/n tokens that leave the window during its piece, and in log2(n) rounds merges what lies before,
and then attends like one device that goes on from this state.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tvq_haiku.attention import blocking, compressive_cache, quantization
from tvq_haiku.attention.blocking import KeyValues
from tvq_haiku.attention.compressive_cache import Cache
from tvq_haiku.attention.full import FullOutput, full_attention
from tvq_haiku.attention.state import AttentionState
from tvq_haiku.attention.vq import AttentionOutput, vq_attention
from tvq_haiku.parallel import sharding
from tvq_haiku.types import Array

SEQUENCE = "sequence"


class _Operands(NamedTuple):
  """What attentions take by position."""

  q: Array
  k: Array
  v: Array
  codebook: Array | None = None


def sharded_attention(
  attention: Callable[..., Any],
  q: Array,
  k: Array,
  v: Array,
  *codebook: Array,
  state: Any = None,
  segment_ids: Array | None = None,
  lengths: Array | None = None,
  content_bias: Array | None = None,
  position_bias: Array | None = None,
  relative_keys: Array | None = None,
  **settings: Any,
) -> Any:
  """`attention(q, k, v, *codebook, state=state, ...)`, on the mesh in use if there is one.

  Args:
    attention: `vq_attention` or `full_attention`; a sequence is only cut for the former.
    q: [B, T, H, K].
    k: [B, T, G, K].
    v: [B, T, G, V].
    *codebook: [G, S, K], for `vq_attention`.
    state: as the attention takes it; None only of an encoder.
    segment_ids: [B, T].
    lengths: [B].
    content_bias: [H, K].
    position_bias: [H, K].
    relative_keys: [M+1, G, K].
    **settings: the same on every device.

  Returns:
    What the attention returns.
  """
  sizes = sharding.axis_sizes()
  arrays = dict(
    state=state,
    segment_ids=segment_ids,
    lengths=lengths,
    content_bias=content_bias,
    position_bias=position_bias,
    relative_keys=relative_keys,
  )
  if not sizes:
    return attention(q, k, v, *codebook, **arrays, **settings)
  is_causal, n_piece = settings.get("is_causal", True), sizes.get(SEQUENCE, 1)
  state_after = state if is_causal else None
  values = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype)
  cut = None
  if attention is full_attention:
    out = FullOutput(values, state_after)
  else:
    out = AttentionOutput(values, jax.ShapeDtypeStruct(k.shape[:3], jnp.int32), state_after)
    # Windows come from one neighbour; shorter pieces, as of an evaluation's last window, stay whole.
    if (
      is_causal
      and q.shape[1] % n_piece == 0
      and q.shape[1] // n_piece >= state.memory_docs.shape[1]
    ):
      cut, attention = SEQUENCE, functools.partial(_attend_piece, n_piece=n_piece)
  heads, width = sharding.HEADS, sharding.WIDTH
  tokens = (sharding.BATCH_AXES, cut)
  rules = sharding.STATE_RULES | {
    "q": (*tokens, heads),
    "k": (*tokens, heads),
    "v": (*tokens, heads, width),
    "codebook": (heads,),
    "segment_ids": tokens,
    "lengths": tokens[:1],
    "content_bias": (heads,),
    "position_bias": (heads,),
    "relative_keys": (None, heads),
    "values": (*tokens, heads, width),
    "codes": (*tokens, heads),
  }
  by_letter = sharding.head_axes(k.shape[2])

  def spec(path: Any, leaf: Any) -> PartitionSpec:
    last = path[-1]
    axes = rules[last.name if isinstance(last, jax.tree_util.GetAttrKey) else last.key]
    axes = [by_letter.get(axis, axis) if isinstance(axis, str) else axis for axis in axes]
    return sharding.fit_spec(axes, leaf.shape, sizes)

  specs = functools.partial(jax.tree_util.tree_map_with_path, spec)

  def local(operands: _Operands, arrays: dict[str, Any]) -> Any:
    return attention(*(x for x in operands if x is not None), **arrays, **settings)

  operands = _Operands(q, k, v, *codebook)
  # The derivatives of our own in it do not say along which axes they vary.
  return jax.shard_map(
    local, in_specs=(specs(operands), specs(arrays)), out_specs=specs(out), check_vma=False
  )(operands, arrays)


def _attend_piece(
  q: Array,
  k: Array,
  v: Array,
  codebook: Array,
  *,
  n_piece: int,
  state: AttentionState,
  segment_ids: Array | None,
  lengths: Array | None,
  **settings: Any,
) -> AttentionOutput:
  """`vq_attention` of this device's piece; `state` is that before the first one, `lengths` of all."""
  if n_piece == 1:
    return vq_attention(
      q, k, v, codebook, state=state, segment_ids=segment_ids, lengths=lengths, **settings
    )
  B, T = k.shape[:2]
  S, M = codebook.shape[1], state.memory_docs.shape[1]
  d = jax.lax.axis_index(SEQUENCE)
  n_read = jnp.full((B,), n_piece * T, jnp.int32) if lengths is None else lengths
  here = jnp.clip(n_read - d * T, 0, T)
  if segment_ids is None:
    segment_ids = jnp.broadcast_to(jnp.maximum(state.memory_docs[:, -1:], 0), (B, T))

  # Quantized here and in the attention: the compiler does it once.
  codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))
  codes = quantization.nearest_codes(k, codebook)
  k_hat = quantization.straight_through(
    k.astype(jnp.float32), quantization.look_up(codes, codebook)
  )
  piece = KeyValues(
    jnp.where((jnp.arange(T) < here[:, None])[:, None], codes.swapaxes(1, 2), S),
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
  memory = _from_before(blocking.slice_tokens(piece, T - M, T), 1, n_piece, otherwise=memory)

  leaving = blocking.split_blocks(
    blocking.slice_tokens(blocking.concatenate(memory, piece), 0, T), 1
  )
  cache = Cache(
    state.cache_counts[:, :, None], state.cache_means[:, :, None], state.cache_doc[:, None, None]
  )
  own = compressive_cache.summarize(leaving.codes, leaving.values, leaving.docs, S)
  own = _where(d == 0, compressive_cache.merge(cache, own), own)
  distance = 1
  while distance < n_piece:
    before = _from_before(own, distance, n_piece, otherwise=own)
    own = _where(d >= distance, compressive_cache.merge(before, own), own)
    distance *= 2
  cache = _from_before(own, 1, n_piece, otherwise=cache)

  out = vq_attention(
    q,
    k,
    v,
    codebook,
    segment_ids=segment_ids,
    lengths=here,
    state=AttentionState(
      state.position + d * T,
      memory.codes,
      memory.keys,
      memory.values.astype(state.memory_values.dtype),
      memory.docs[:, 0],
      cache.counts[:, :, 0],
      cache.means[:, :, 0],
      cache.doc[:, 0, 0],
    ),
    **settings,
  )
  # The state after the row is that of the device where the row ends.
  is_last = d == jnp.maximum(-(-n_read // T) - 1, 0)
  return out._replace(
    state=jax.tree.map(
      lambda x: jax.lax.psum(
        jnp.where(is_last.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros_like(x)), SEQUENCE
      ),
      out.state,
    )
  )


def _from_before(x: Any, distance: int, n_piece: int, *, otherwise: Any) -> Any:
  """What the device `distance` places before this one has; `otherwise` where there is none."""
  pairs = [(i, i + distance) for i in range(n_piece - distance)]
  received = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, SEQUENCE, pairs), x)
  return _where(jax.lax.axis_index(SEQUENCE) >= distance, received, otherwise)


def _where(condition: Array, x: Any, y: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)
