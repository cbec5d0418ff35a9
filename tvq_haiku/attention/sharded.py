"""Attention on a mesh of devices.

Letters: B batch, T tokens, H query heads, G key/value heads, S codes, M memory length, K key width,
V value width.

Batch elements, heads, the width of the values, and the sequence can be sharded. Only a sharded
sequence needs communication. Along the mesh axis `sequence`, device d holds the d-th of n
consecutive shards of T/n tokens. It receives

  - from its neighbour, the M tokens before its shard;
  - by an associative scan over the devices, the cache of all tokens before those: each device
    summarizes the T/n tokens that leave the window during its shard, and merges the summaries of
    the devices before it in log2(n) rounds.

Then it attends like a single device that continues from this state.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tvq_haiku.attention import blocking, compressive_cache, key_values
from tvq_haiku.attention.compressive_cache import Cache
from tvq_haiku.attention.full import FullOutput
from tvq_haiku.attention.key_values import KeyValues
from tvq_haiku.attention.state import AttentionState, KeyValueState
from tvq_haiku.attention.vq import AttentionOutput, vq_attention
from tvq_haiku.parallel import sharding
from tvq_haiku.types import Array, ArrayTree, Tree

SEQUENCE = "sequence"  # the mesh axis


class _Operands(NamedTuple):
  """Positional arguments of an attention function; `_specs_for` goes by their names."""

  q: Array
  k: Array
  v: Array
  codebook: Array | None = None


def sharded_attention(
  attention: Callable[..., Tree],
  q: Array,
  k: Array,
  v: Array,
  *codebook: Array,
  state: AttentionState | KeyValueState | None = None,
  segment_ids: Array | None = None,
  lengths: Array | None = None,
  content_bias: Array | None = None,
  position_bias: Array | None = None,
  relative_keys: Array | None = None,
  **settings: Any,
) -> Tree:
  """Computes `attention(q, k, v, *codebook, state=state, ...)`, sharded over the mesh in use.

  Without a mesh, it only calls `attention`.

  Args:
    attention: `vq_attention` or `full_attention`; only the former shards a sequence.
    q: [B, T, H, K].
    k: [B, T, G, K].
    v: [B, T, G, V].
    *codebook: [G, S, K], for `vq_attention`.
    state: see `attention`; None only for an encoder.
    segment_ids: [B, T] int32.
    lengths: [B] int32.
    content_bias: [H, K].
    position_bias: [H, K].
    relative_keys: [M+1, G, K].
    **settings: other arguments of `attention`, which are not arrays.

  Returns:
    The output of `attention`.
  """
  chex.assert_equal_shape_prefix((q, k, v), 2)
  mesh_sizes = sharding.axis_sizes()
  arrays = dict(
    state=state,
    segment_ids=segment_ids,
    lengths=lengths,
    content_bias=content_bias,
    position_bias=position_bias,
    relative_keys=relative_keys,
  )
  if not mesh_sizes:
    return attention(q, k, v, *codebook, **arrays, **settings)
  is_causal = settings.get("is_causal", True)
  n_shard = mesh_sizes.get(SEQUENCE, 1)
  sequence_axis = None
  if attention is vq_attention:
    settings["scan"] = jax.lax.scan  # Haiku's scan cannot be used inside of shard_map
    if n_shard > 1 and is_causal and _fits_shards(q, state, n_shard):
      sequence_axis = SEQUENCE
      attention = functools.partial(_attend_shard, n_shard=n_shard)
  out_shapes = _output_shapes(q, k, v, state if is_causal else None, is_full=not codebook)
  spec_tree = _specs_for(k.shape[2], mesh_sizes, sequence_axis)

  def attend_locally(operands: _Operands, arrays: dict[str, ArrayTree]) -> Tree:
    return attention(*(x for x in operands if x is not None), **arrays, **settings)

  operands = _Operands(q, k, v, *codebook)
  return jax.shard_map(
    attend_locally,
    in_specs=(spec_tree(operands), spec_tree(arrays)),
    out_specs=spec_tree(out_shapes),
    check_vma=False,  # our custom derivatives do not declare the axes that they vary over
  )(operands, arrays)


def _fits_shards(q: Array, state: AttentionState, n_shard: int) -> bool:
  """Returns whether a sequence can be sharded: a shard must have at least M tokens.

  Then the memory before each shard lies in one neighbour. A shorter sequence, such as the last
  window of an evaluation, is replicated.
  """
  T, M = q.shape[1], state.memory_docs.shape[1]
  return T % n_shard == 0 and T // n_shard >= M


def _output_shapes(
  q: Array, k: Array, v: Array, state: AttentionState | KeyValueState | None, *, is_full: bool
) -> FullOutput | AttentionOutput:
  """Returns the shapes of the output of attention; the state after it has the shapes of `state`."""
  values = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype)
  if is_full:
    return FullOutput(values, state)
  return AttentionOutput(values, jax.ShapeDtypeStruct(k.shape[:3], jnp.int32), state)


def _specs_for(
  n_kv_head: int, mesh_sizes: dict[str, int], sequence_axis: str | None
) -> Callable[[ArrayTree], ArrayTree]:
  """Returns a function that maps a tree of named arrays to a tree of partition specs."""
  heads, width = sharding.HEADS, sharding.WIDTH
  tokens = (sharding.BATCH_AXES, sequence_axis)
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
  mesh_axes = sharding.head_axes(n_kv_head)  # what heads and width stand for

  def spec(path: jax.tree_util.KeyPath, leaf: Array) -> PartitionSpec:
    field = path[-1]
    axes = rules[field.name if isinstance(field, jax.tree_util.GetAttrKey) else field.key]
    axes = [mesh_axes.get(axis, axis) if isinstance(axis, str) else axis for axis in axes]
    return sharding.fit_spec(axes, leaf.shape, mesh_sizes)

  return functools.partial(jax.tree_util.tree_map_with_path, spec)


def _attend_shard(
  q: Array,
  k: Array,
  v: Array,
  codebook: Array,
  *,
  n_shard: int,
  state: AttentionState,
  segment_ids: Array | None,
  lengths: Array | None,
  **settings: Any,
) -> AttentionOutput:
  """Computes `vq_attention` for this device's shard of the sequence.

  Args:
    q: [B, T/n, H, K].
    k: [B, T/n, G, K].
    v: [B, T/n, G, V].
    codebook: [G, S, K].
    n_shard: n, the number of devices along the sequence; at least 2.
    state: the state before the first shard.
    segment_ids: [B, T/n] int32, or None.
    lengths: [B] int32: number of tokens of all shards together, or None: all T.
    **settings: of `vq_attention`.

  Returns:
    Values and codes of the shard, and the state after the last shard.
  """
  B, T = k.shape[:2]  # T is that of one shard
  device = jax.lax.axis_index(SEQUENCE)
  n_total = jnp.full((B,), n_shard * T, jnp.int32) if lengths is None else lengths
  n_here = jnp.clip(n_total - device * T, 0, T)
  if segment_ids is None:
    segment_ids = key_values.continued_doc_ids(state, T)
  # Keys are quantized here and in `vq_attention`; XLA merges the two computations.
  _, tokens = key_values.quantize(k, v, codebook, segment_ids, n_here)
  memory, cache = _context_of_shard(tokens, state, codebook.shape[1], n_shard)
  shard_state = key_values.next_state(state, jnp.full((B,), device * T), memory, cache)
  out = vq_attention(
    q, k, v, codebook, segment_ids=segment_ids, lengths=n_here, state=shard_state, **settings
  )
  # The state after a row is that of the device that holds the last token of the row.
  is_last = device == jnp.maximum(-(-n_total // T) - 1, 0)
  return out._replace(state=_select_by_sum(out.state, is_last))


def _context_of_shard(
  tokens: KeyValues, state: AttentionState, n_code: int, n_shard: int
) -> tuple[KeyValues, Cache]:
  """Returns the M tokens before this device's shard, and the cache of all tokens before those.

  Args:
    tokens: the tokens of this shard.
    state: the state before the first shard.
    n_code: S.
    n_shard: number of devices along the sequence.
  """
  T, M = tokens.doc_ids.shape[2], state.memory_docs.shape[1]
  chex.assert_scalar_non_negative(T - M)
  device = jax.lax.axis_index(SEQUENCE)
  last = blocking.slice_tokens(tokens, T - M, T)
  memory = _receive(last, 1, n_shard, otherwise=key_values.memory_of(state, tokens))
  sequence = blocking.concatenate(memory, tokens)
  evicted = blocking.split_blocks(blocking.slice_tokens(sequence, 0, T), 1)
  summary = compressive_cache.summarize(evicted.codes, evicted.values, evicted.doc_ids, n_code)
  before_all = key_values.cache_of(state)
  merge = compressive_cache.merge
  summary = _where(device == 0, merge(before_all, summary), summary)
  distance = 1
  while distance < n_shard:  # `summary` covers the last `distance` shards, up to this one
    before = _receive(summary, distance, n_shard, otherwise=summary)
    summary = _where(device >= distance, merge(before, summary), summary)
    distance *= 2
  return memory, _receive(summary, 1, n_shard, otherwise=before_all)


def _receive(x: ArrayTree, distance: int, n_shard: int, *, otherwise: ArrayTree) -> ArrayTree:
  """Returns `x` of the device whose index is less by `distance`; `otherwise` if there is none."""
  pairs = [(i, i + distance) for i in range(n_shard - distance)]
  received = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, SEQUENCE, pairs), x)
  return _where(jax.lax.axis_index(SEQUENCE) >= distance, received, otherwise)


def _select_by_sum(x: ArrayTree, is_selected: Array) -> ArrayTree:
  """Returns each batch element of `x` from the one device where its `is_selected` [B] is True."""

  def select(leaf: Array) -> Array:
    mask = is_selected.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jax.lax.psum(jnp.where(mask, leaf, jnp.zeros_like(leaf)), SEQUENCE)

  return jax.tree.map(select, x)


def _where(condition: Array, x: ArrayTree, y: ArrayTree) -> ArrayTree:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)
