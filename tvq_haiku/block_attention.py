"""Softmax attention over vector-quantized keys in linear time: the algorithm, as pure functions.

Letters: B batch, T tokens, R blocks, L block length, M memory length, W = M+L, H query heads,
G key/value heads, P = H/G query heads a group, S codes, K key width, V value width.

Query i attends every earlier token j of its document with weight softmax_j of
  (q_i + u)·k̂_j + (q_i + v)·r_{i-j}     where k̂_j = C_{z_j}, and r_d = 0 for d > M.
Tokens in the window (the M before a block, and the block) are attended one by one. Of older ones
only the code enters the score, so the n_s of them that share code s act together as one key C_s
with logit (q_i + u)·C_s + log n_s and their mean value m_s. That is exact for quantized keys.
The cache of (n_s, m_s) absorbs a chunk of c_s tokens with value sums t_s by
  n' = n + c,    m' = (n/n') m + t/n'.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku import positions
from tvq_haiku import quantizer

Array = jax.Array

_NO_DOCUMENT = -1  # document of an attention that has read nothing
_MASKED = -1e30  # finite, so that a fully masked row stays free of NaN


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


class AttentionOutput(NamedTuple):
  """What `vq_attention` returns."""

  values: Array  # [B, T, H, V]
  codes: Array  # [B, T, G] int32: z
  state: AttentionState


class _Tokens(NamedTuple):
  """Keys and values in reading order; n of them, along axis 2 of every field."""

  codes: Array  # [B, G, n] int32: S for an empty slot
  keys: Array  # [B, G, n, K]
  values: Array  # [B, G, n, V]
  docs: Array  # [B, 1, n] int32


class _Cache(NamedTuple):
  """What is left of the tokens that were evicted from the window."""

  counts: Array  # [B, G, S] f32
  means: Array  # [B, G, S, V] f32
  doc: Array  # [B] int32


class _ScoreTerms(NamedTuple):
  """What queries meet in every block."""

  codebook: Array  # [G, S, K] f32
  relative_keys: Array | None  # [G, P, M+1, K], of distances M, M-1, ..., 0
  content_bias: Array  # [G, P, 1, K] u
  position_bias: Array  # [G, P, 1, K] v


def initial_attention_state(*, batch_size: int, n_kv_head: int, n_code: int, mem_len: int,
                            d_k: int, d_v: int, dtype: jnp.dtype = jnp.float32) -> AttentionState:
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
      memory_docs=jnp.full((b, m), _NO_DOCUMENT, jnp.int32),
      cache_counts=jnp.zeros((b, g, n_code), jnp.float32),
      cache_means=jnp.zeros((b, g, n_code, d_v), jnp.float32),
      cache_doc=jnp.full((b,), _NO_DOCUMENT, jnp.int32),
  )


def vq_attention(
    q: Array,
    k: Array,
    v: Array,
    codebook: Array,
    *,
    state: AttentionState,
    relative_keys: Array | None = None,
    content_bias: Array | None = None,
    position_bias: Array | None = None,
    doc_ids: Array | None = None,
    lengths: Array | None = None,
    block_len: int = 256,
    agg_cache: bool = True,
    grad_thru_cache: bool = True,
    remat: bool = False,
) -> AttentionOutput:
  """Causal softmax attention over quantized keys, in time and memory linear in T.

  Values do not depend on `block_len`, nor on how a sequence is cut into calls. Gradients do: a key
  learns from the queries that see it in their window, values through the cache as well.

  Args:
    q: [B, T, H, K] queries. Head h reads key/value head h // (H/G).
    k: [B, T, G, K] keys; they are quantized here, and get a straight-through gradient.
    v: [B, T, G, V] values.
    codebook: [G, S, K] codes; they get no gradient.
    state: what was read before, or `initial_attention_state`. Its memory length is M.
    relative_keys: [M+1, H, K] r_d for distances d = 0, ..., M; None: no relative bias.
    content_bias: [H, K] u; None: zero.
    position_bias: [H, K] v; None: zero.
    doc_ids: [B, T] int32: tokens attend only tokens of their own document. Documents are
      contiguous; an id must not come back after another one. None: one document.
    lengths: [B] int32: how many of the T tokens are real; padding follows them, and is neither
      attended nor remembered (its own outputs mean nothing). None: all T.
    block_len: L; tokens that one step of the scan attends together.
    agg_cache: False masks every token farther back than M.
    grad_thru_cache: False stops all gradients at the start of each block.
    remat: recompute each block's scores in the backward pass instead of keeping them.

  Returns:
    values [B, T, H, V] in the dtype of `v`, codes [B, T, G], and the state after the T tokens.

  >>> q = k = jax.random.normal(jax.random.key(0), (1, 10, 1, 4))
  >>> codebook = jax.random.normal(jax.random.key(1), (1, 8, 4))
  >>> state = initial_attention_state(
  ...     batch_size=1, n_kv_head=1, n_code=8, mem_len=3, d_k=4, d_v=4)
  >>> out = vq_attention(q, k, q, codebook, state=state, block_len=3)
  >>> out.values.shape, int(out.state.position[0])
  ((1, 10, 1, 4), 10)
  """
  B, T, H, _ = q.shape
  G, S, _ = codebook.shape
  V, M = v.shape[-1], state.memory_docs.shape[-1]
  _check_shapes(q, k, v, codebook, state, relative_keys, content_bias, position_bias, doc_ids)
  if block_len < 1 or T < 1:
    raise ValueError(f"vq_attention: block_len={block_len} and T={T} must be at least 1.")
  codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))
  codes = quantizer.nearest_codes(k, codebook)
  k_hat = quantizer.straight_through(k.astype(jnp.float32), quantizer.look_up(codes, codebook))
  n_read = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
  is_token = jnp.arange(T) < n_read[:, None]
  docs = jnp.zeros((B, T), jnp.int32) if doc_ids is None else doc_ids
  sequence = _Tokens(jnp.where(is_token[:, None], codes.swapaxes(1, 2), S), k_hat.swapaxes(1, 2),
                     v.swapaxes(1, 2), docs[:, None])
  memory = _Tokens(state.memory_codes, state.memory_keys, state.memory_values.astype(v.dtype),
                   state.memory_docs[:, None])
  terms = _score_terms(q, codebook, relative_keys, content_bias, position_bias)

  L = min(block_len, T)
  R = -(-T // L)

  def attend_block(carry: tuple[_Tokens, _Cache], block: tuple[Array, Array, _Tokens]):
    memory, cache = carry if grad_thru_cache else jax.lax.stop_gradient(carry)
    start, q, tokens = block
    window = _concat(memory, tokens)
    values = _attend(q, tokens.docs, window, cache, terms, agg_cache=agg_cache)
    # In the row (memory, sequence) the M slots from `n_read` on stay in memory for good, so the
    # final cache must not hold them. Only padding would have seen them there.
    evicted = start + jnp.arange(L) < n_read[:, None]
    leaving = _slice(window, 0, L)
    leaving = leaving._replace(codes=jnp.where(evicted[:, None], leaving.codes, S))
    cache = _absorb(cache, leaving)
    return (_slice(window, L, L + M), cache), values

  padding = R * L - T
  starts = jnp.arange(R, dtype=jnp.int32) * L
  queries = _pad(q.reshape(B, T, G, H // G, -1).transpose(0, 2, 1, 3, 4), padding, 0)
  padded = _Tokens(_pad(sequence.codes, padding, S),
                   *(_pad(x, padding, 0) for x in sequence[1:]))
  blocks = (starts, _cut(queries, R).swapaxes(-2, -3), jax.tree.map(lambda x: _cut(x, R), padded))
  cache = _Cache(state.cache_counts, state.cache_means, state.cache_doc)
  # A pure body needs no hk.scan, and so the function runs outside of hk.transform as well.
  body = jax.checkpoint(attend_block, prevent_cse=False) if remat else attend_block
  (_, cache), values = jax.lax.scan(body, (memory, cache), blocks)

  values = values.transpose(1, 0, 4, 2, 3, 5).reshape(B, R * L, H, V)[:, :T]
  memory = _last_read(memory, sequence, lengths)
  state = AttentionState(
      state.position + n_read, memory.codes, memory.keys,
      memory.values.astype(state.memory_values.dtype), memory.docs[:, 0], *cache)
  return AttentionOutput(values, codes, state)


def _attend(q: Array, docs: Array, window: _Tokens, cache: _Cache, terms: _ScoreTerms, *,
            agg_cache: bool) -> Array:
  """Values [B, G, P, L, V] for the queries [B, G, P, L, K] of the last L tokens of the window."""
  L, W = q.shape[-2], window.docs.shape[-1]
  M = W - L
  f32 = jnp.float32
  content = q + terms.content_bias
  scores = jnp.einsum("bgplk,bgwk->bgplw", content, window.keys.astype(q.dtype),
                      preferred_element_type=f32)
  if terms.relative_keys is not None:
    by_distance = jnp.einsum("bgplk,gpdk->bgpld", q + terms.position_bias, terms.relative_keys,
                             preferred_element_type=f32)
    scores += positions.align_distances(by_distance, L)
  distance = M + jnp.arange(L)[:, None] - jnp.arange(W)
  visible = distance >= 0
  if not agg_cache:
    visible = visible & (distance <= M)
  visible = visible & (window.codes[:, 0, None] < terms.codebook.shape[1])
  visible = visible & (docs[:, 0, :, None] == window.docs)  # [B, L, W]
  scores = jnp.where(visible[:, None, None], scores, _MASKED)
  values = window.values

  if agg_cache:
    cached = jnp.einsum("bgplk,gsk->bgpls", content, terms.codebook.astype(q.dtype),
                        preferred_element_type=f32)
    counts = cache.counts[:, :, None, None]
    cached = jnp.where(counts > 0.0, cached + jnp.log(jnp.maximum(counts, 1.0)), _MASKED)
    own = docs[:, 0] == cache.doc[:, None]  # [B, L]
    scores = jnp.concatenate(
        [jnp.where(own[:, None, None, :, None], cached, _MASKED), scores], axis=-1)
    values = jnp.concatenate([cache.means.astype(values.dtype), values], axis=-2)

  weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
  return jnp.einsum("bgplw,bgwv->bgplv", weights.astype(values.dtype), values,
                    preferred_element_type=f32).astype(values.dtype)


def _absorb(cache: _Cache, leaving: _Tokens) -> _Cache:
  """Merges tokens that leave the window into the cache, keeping to the last document."""
  S = cache.counts.shape[-1]
  n = leaving.docs.shape[-1]
  is_token = leaving.codes[:, 0] < S  # [B, n]
  last = jnp.max(jnp.where(is_token, jnp.arange(n), -1), axis=-1)
  last_doc = jnp.take_along_axis(leaving.docs[:, 0], jnp.maximum(last, 0)[:, None], axis=-1)[:, 0]
  doc = jnp.where(last >= 0, last_doc, cache.doc)
  own = leaving.docs == doc[:, None, None]  # [B, 1, n]
  weights = jax.nn.one_hot(jnp.where(own, leaving.codes, S), S, dtype=jnp.float32)
  before = jnp.where((cache.doc == doc)[:, None, None], cache.counts, 0.0)
  counts = before + jnp.sum(weights, axis=2)
  share = 1.0 / jnp.maximum(counts, 1.0)[..., None]
  sums = jnp.einsum("bgns,bgnv->bgsv", weights, leaving.values.astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST)  # or TF32 would wear the means down
  return _Cache(counts, (before[..., None] * share) * cache.means + share * sums, doc)


def _last_read(memory: _Tokens, sequence: _Tokens, lengths: Array | None) -> _Tokens:
  """The last M of (memory, the first `lengths` tokens of the sequence)."""
  M, T = memory.docs.shape[-1], sequence.docs.shape[-1]
  if lengths is None and T >= M:
    return _slice(sequence, T - M, T)
  both = _concat(memory, sequence)
  if lengths is None:
    return _slice(both, T, T + M)
  take = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, M, axis=1))
  return jax.tree.map(lambda x: take(x, lengths), both)


def _score_terms(q: Array, codebook: Array, relative_keys: Array | None,
                 content_bias: Array | None, position_bias: Array | None) -> _ScoreTerms:
  """Groups heads, and orders distances as the window is laid out."""
  H, K = q.shape[-2:]
  G = codebook.shape[0]

  def per_head(bias: Array | None) -> Array:
    bias = jnp.zeros((H, K)) if bias is None else bias
    return bias.astype(q.dtype).reshape(G, H // G, 1, K)

  if relative_keys is not None:
    relative_keys = relative_keys[::-1].astype(q.dtype).reshape(-1, G, H // G, K)
    relative_keys = relative_keys.transpose(1, 2, 0, 3)
  return _ScoreTerms(codebook, relative_keys, per_head(content_bias), per_head(position_bias))


def _concat(a: _Tokens, b: _Tokens) -> _Tokens:
  return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=2), a, b)


def _slice(tokens: _Tokens, start: int, stop: int) -> _Tokens:
  return jax.tree.map(lambda x: x[:, :, start:stop], tokens)


def _pad(x: Array, n: int, value: int) -> Array:
  """Appends n times `value` along axis 2."""
  widths = [(0, n) if axis == 2 else (0, 0) for axis in range(x.ndim)]
  return jnp.pad(x, widths, constant_values=value)


def _cut(x: Array, n_block: int) -> Array:
  """[B, ?, R·L, ...] -> [R, B, ?, L, ...]."""
  cut = x.reshape(*x.shape[:2], n_block, x.shape[2] // n_block, *x.shape[3:])
  return jnp.moveaxis(cut, 2, 0)


def _check_shapes(q: Array, k: Array, v: Array, codebook: Array, state: AttentionState,
                  relative_keys: Array | None, content_bias: Array | None,
                  position_bias: Array | None, doc_ids: Array | None) -> None:
  dims = chex.Dimensions()
  dims["BTHK"] = q.shape
  dims["GS"] = codebook.shape[:2]
  dims["V"] = v.shape[-1:]
  dims["M"] = state.memory_docs.shape[-1:]
  if q.shape[-2] % codebook.shape[0]:
    raise ValueError(f"vq_attention: {q.shape[-2]} query heads cannot share "
                     f"{codebook.shape[0]} key/value heads evenly.")
  chex.assert_shape(k, dims["BTGK"])
  chex.assert_shape(v, dims["BTGV"])
  chex.assert_shape(codebook, dims["GSK"])
  chex.assert_shape(state.memory_keys, dims["BGMK"])
  chex.assert_shape(state.cache_means, dims["BGSV"])
  if relative_keys is not None:
    chex.assert_shape(relative_keys, (state.memory_docs.shape[-1] + 1, *dims["HK"]))
  for bias in (content_bias, position_bias):
    if bias is not None:
      chex.assert_shape(bias, dims["HK"])
  if doc_ids is not None:
    chex.assert_shape(doc_ids, dims["BT"])
