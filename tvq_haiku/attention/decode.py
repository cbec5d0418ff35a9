"""One token at a time: a window that is written in place, and one row of the cache.

Letters: B batch, M memory length, W = M+1 slots, H query heads, G key/value heads, Z = B·G, P = H/G
query heads a group, S codes, K key width, V value width.

The W slots hold the M tokens before the next one, and the token before those, which the next one
drives out: it goes into the cache, and its slot is the new one's. Then the query attends the W
slots as they lie, and the cache. Nothing is moved, and all rows of a batch write the same slot.

Two things here are for XLA, which copies a whole array rather than risk that a row is read after
it has been overwritten. The large arrays have one leading axis Z, or none where Z = 1, so that no
reshape stands between the update of a row and the product that reads all of them. And the values
that a step drives out are read at the end of the step before.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.attention import quantization
from tvq_haiku.attention.block_scores import MASKED
from tvq_haiku.attention.compressive_cache import NO_DOCUMENT
from tvq_haiku.attention.state import AttentionState, KeyValueState
from tvq_haiku.ops import softmax
from tvq_haiku.types import Array

_F32 = dict(preferred_element_type=jnp.float32)


class Codes(NamedTuple):
  """What quantized keys need beside the window: its codes, and the cache of what has left it."""

  window: Array  # [B, G, W] int32: S where the slot is empty
  counts: Array  # [B, G, S] f32: tokens of each code that have left
  means: Array  # [Z, S, V] f32: their mean values; anything where the count is 0
  doc: Array  # [B] int32: the document that they belong to


class Ring(NamedTuple):
  """What one attention remembers between two tokens; [Z, ...] stands for [...] where Z = 1."""

  keys: Array  # [Z, W, K]
  values: Array  # [Z, W, V]
  docs: Array  # [B, W] int32: -1 where the slot is empty
  leaving: Array  # [B, G, V]: the values in the slot that is written next
  codes: Codes | None  # None: plain keys, and nothing beyond the window


class DecodeParams(NamedTuple):
  """What is the same for every token."""

  content_bias: Array  # [H, K] u
  position_bias: Array  # [H, K] v
  relative: Array  # [G, W, K] r_M, ..., r_0
  codebook: Array | None  # [G, S, K] f32; None: plain keys


def from_state(state: AttentionState | KeyValueState) -> Ring:
  """The same memory, with slot M free for the next token."""

  def free_slot(x: Array, filler: int) -> Array:
    axis = 1 if x.ndim == 2 else 2
    widths = [(0, int(i == axis)) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=filler)

  codes = None
  if isinstance(state, AttentionState):
    codes = Codes(
      free_slot(state.memory_codes, state.cache_counts.shape[-1]),
      state.cache_counts,
      _merged(state.cache_means),
      state.cache_doc,
    )
  return Ring(
    _merged(free_slot(state.memory_keys, 0)),
    _merged(free_slot(state.memory_values, 0)),
    free_slot(state.memory_docs, NO_DOCUMENT),
    jnp.zeros_like(state.memory_values[:, :, 0]),
    codes,
  )


def to_state(ring: Ring, *, position: Array, written: Array) -> AttentionState | KeyValueState:
  """The inverse of `from_state`, after some tokens.

  Args:
    ring: what to convert.
    position: [B] int32: tokens read in all.
    written: [B] int32: tokens written to each row since `from_state`.
  """
  B, W = ring.docs.shape
  G = ring.leaving.shape[1]
  order = (W - 1 + written[:, None] + jnp.arange(W)) % W  # [B, W], oldest first

  def memory(x: Array) -> Array:
    index = order if x.ndim == 2 else order.reshape(B, 1, W, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, index, axis=1 if x.ndim == 2 else 2)

  docs = memory(ring.docs)
  keys, values = (memory(x.reshape(B, G, *x.shape[-2:])) for x in (ring.keys, ring.values))
  if ring.codes is None:
    return KeyValueState(position, keys[:, :, 1:], values[:, :, 1:], docs[:, 1:])
  codes = memory(ring.codes.window)
  cache = _add(ring.codes, codes[:, :, 0], values[:, :, 0], docs[:, 0], jnp.ones((B,), bool))
  means = cache.means.reshape(B, G, *cache.means.shape[-2:])
  # Where nothing is counted the caches of whole blocks have 0.
  means = jnp.where(cache.counts[..., None] > 0.0, means, 0.0)
  return AttentionState(
    position,
    codes[:, :, 1:],
    keys[:, :, 1:],
    values[:, :, 1:],
    docs[:, 1:],
    cache.counts,
    means,
    cache.doc,
  )


def decode_step(
  ring: Ring,
  q: Array,
  k: Array,
  v: Array,
  keys: DecodeParams,
  *,
  written: Array,
  document: Array,
  active: Array,
  agg_cache: bool = True,
) -> tuple[Array, Ring]:
  """Reads one token, and returns what it attends to.

  Args:
    ring: what was read before.
    q: [B, H, K], with the scale of the scores.
    k: [B, G, K]; quantized here, if there is a codebook.
    v: [B, G, V].
    keys: of codes and distances, and the biases.
    written: [] int32: tokens that active rows have written since `from_state`.
    document: [B] int32: that the token belongs to.
    active: [B] bool: other rows stay as they are, and their values mean nothing.
    agg_cache: False: the cache is kept, but not attended.

  Returns:
    [B, H, V] in the dtype of `v`, and the ring after the token.
  """
  B, H, K = q.shape
  G, W = k.shape[1], ring.docs.shape[1]
  slot = (W - 1 + written) % W
  codes = ring.codes
  if codes is not None:
    code = quantization.nearest_codes(k[:, None], keys.codebook)[:, 0]  # [B, G]
    k = quantization.look_up(code[:, None], keys.codebook)[:, 0]
    old_code = codes.window[:, :, slot]
    codes = _add(codes, old_code, ring.leaving, ring.docs[:, slot], active)
    codes = codes._replace(
      window=codes.window.at[:, :, slot].set(jnp.where(active[:, None], code, old_code))
    )
  docs = ring.docs.at[:, slot].set(jnp.where(active, document, ring.docs[:, slot]))
  is_active = active[:, None, None]
  old_k = jax.lax.dynamic_index_in_dim(ring.keys, slot, ring.keys.ndim - 2, keepdims=False)
  new_k = jnp.where(is_active, k.astype(old_k.dtype), old_k.reshape(k.shape))
  rows_k = _replace(ring.keys, slot, _merged(new_k))
  rows_v = _replace(ring.values, slot, _merged(jnp.where(is_active, v, ring.leaving)))

  content, position = (
    (q + bias.astype(q.dtype)).reshape(B, G, H // G, K)
    for bias in (keys.content_bias, keys.position_bias)
  )
  scores = jnp.einsum("...pk,...wk->...pw", _merged(content.astype(rows_k.dtype)), rows_k, **_F32)
  # Slot j holds the token at distance (slot - j) mod W; row i of `relative` is of distance M - i.
  bias = jnp.einsum("bgpk,gwk->bgpw", position, keys.relative, **_F32)
  bias = jax.lax.dynamic_slice_in_dim(
    jnp.concatenate([bias, bias], axis=-1), W - 1 - slot, W, axis=-1
  )
  visible = (docs == document[:, None])[:, None, None]
  scores = [jnp.where(visible, scores.reshape(bias.shape) + bias, MASKED)]
  values = [rows_v]
  if codes is not None and agg_cache:
    score = jnp.einsum("bgpk,gsk->bgps", content.astype(jnp.float32), keys.codebook, **_F32)
    score += jnp.log(jnp.maximum(codes.counts, 1.0))[:, :, None]
    visible = (codes.counts > 0.0) & (codes.doc == document)[:, None, None]
    scores.append(jnp.where(visible[:, :, None], score, MASKED))
    values.append(codes.means)
  mixed = sum(
    jnp.einsum("...pn,...nv->...pv", _merged(weights).astype(rows.dtype), rows, **_F32)
    for weights, rows in zip(softmax.softmax_weights(scores), values)
  )
  leaving = jax.lax.dynamic_index_in_dim(rows_v, (slot + 1) % W, rows_v.ndim - 2, keepdims=False)
  ring = Ring(rows_k, rows_v, docs, leaving.reshape(ring.leaving.shape), codes)
  return mixed.reshape(B, H, -1).astype(v.dtype), ring


def _merged(x: Array) -> Array:
  """[B, G, ...] -> [Z, ...], or [...] where Z = 1."""
  return x.reshape(x.shape[2:] if x.shape[:2] == (1, 1) else (-1, *x.shape[2:]))


def _replace(rows: Array, slot: Array, new: Array) -> Array:
  """`rows` [Z, n, ...] with `new` [Z, ...] in `slot`, one for all or one for each of Z; or without Z."""
  if rows.ndim == 2:
    return jax.lax.dynamic_update_index_in_dim(rows, new, slot, 0)
  # A scatter is never fused with what reads its result, which would have it computed twice.
  Z = rows.shape[0]
  place = (jnp.arange(Z), jnp.broadcast_to(slot, (Z,)))
  return rows.at[place].set(new, mode="promise_in_bounds", unique_indices=True)


def _add(codes: Codes, code: Array, value: Array, doc: Array, active: Array) -> Codes:
  """Counts one token [B, G] of `doc` [B] in active rows; an empty one (code S) counts nothing."""
  S = codes.counts.shape[-1]
  counted = active[:, None] & (code < S)  # [B, G]; all heads of a row agree
  doc = jnp.where(counted[:, 0], doc, codes.doc)
  kept = jnp.where((doc == codes.doc)[:, None, None], codes.counts, 0.0)
  here = jnp.arange(S) == code[..., None]  # one pass over numbers that are read anyway
  counts = kept + (here & counted[..., None])
  n_kept, n = (jnp.sum(jnp.where(here, x, 0.0), axis=-1, keepdims=True) for x in (kept, counts))

  rows = codes.means
  place = _merged(jnp.minimum(code, S - 1))
  old = rows[place] if rows.ndim == 2 else rows[jnp.arange(rows.shape[0]), place]
  old = old.reshape(value.shape)
  mean = (n_kept * old + value.astype(jnp.float32)) / jnp.maximum(n, 1.0)
  rows = _replace(rows, place, _merged(jnp.where(counted[..., None], mean, old)))
  return Codes(codes.window, counts, rows, doc)
