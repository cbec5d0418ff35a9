"""Transformer-VQ attention, written for reading. Start here.

The two attention functions below state the algorithm without optimizations: `quadratic_attention`
over all pairs of tokens, `recurrent_attention` token by token with a state of constant size. Both
compute the same values. `vq_attention` computes them in linear time, block by block, and the tests
compare it with this file. The score of query i for key j is

  K^(-1/2) [(q_i + u)·k̂_j + (q_i + w)·r_{i-j}]    where k̂_j = C_{z_j}, and r_d = 0 for d > M.

  paper                         code                       meaning
  q_i                           q [B,T,H,K]                queries
  k_j, v_j                      k [B,T,G,K], v [B,T,G,V]   keys and values
  codebook C of S codes         codebook [G,S,K]           one codebook for each key head
  shortcode z_j                 codes [B,T,G]              index of the code nearest to k_j
  VQ(k_j; C)                    k_hat [B,T,G,K]            the vector-quantized key: row z_j of C
  block of length L             block_len                  L consecutive queries with one window
  window                        mem_len M                  the block, and the M tokens before it
  biases of Transformer-XL      content_bias u [H,K],      added to q in the content score and
                                position_bias w [H,K]      in the position score
  relative positions            relative_keys r [M+1,G,K]  one key for each distance
  compressive cache             counts n [B,G,S],          number of tokens of each code that have
                                means m [B,G,S,V]          left the window, and their mean value

Letters: B batch, T tokens, H query heads, G key/value heads, P = H/G query heads for each of them,
S codes, K key width, V value width, M memory length, which is also the longest distance with a
relative bias. The paper calls the second bias v; it is w here, because v are the values.

Sections of the paper (Lingle 2024, arXiv 2309.16354): `quadratic_attention` is its quadratic-time
formulation; `recurrent_attention` is its linear-time decoder attention with blocks of one token.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.ops.softmax import MASKED
from tvq_haiku.types import Array


def quantize(k: Array, codebook: Array) -> tuple[Array, Array]:
  """Returns the codes [B,T,G] of keys [B,T,G,K], and the quantized keys [B,T,G,K].

  A quantized key equals its code; its gradient goes to the key unchanged (straight-through).
  """
  G, S, K = codebook.shape
  chex.assert_shape(k, (None, None, G, K))
  distances = jnp.sum((k[:, :, :, None] - codebook) ** 2, axis=-1)  # |k_t - C_s|^2 [B, T, G, S]
  codes = jnp.argmin(distances, axis=-1)
  nearest = jnp.einsum("btgs,gsk->btgk", jax.nn.one_hot(codes, S, dtype=codebook.dtype), codebook)
  return codes, k + jax.lax.stop_gradient(nearest - k)


def quadratic_attention(
  q: Array,
  k: Array,
  v: Array,
  codebook: Array | None,
  *,
  mem_len: int,
  block_len: int | None = None,
  is_causal: bool = True,
  relative_keys: Array | None = None,
  content_bias: Array | None = None,
  position_bias: Array | None = None,
  segment_ids: Array | None = None,
  lengths: Array | None = None,
  agg_cache: bool = True,
) -> Array:
  """Computes attention over all pairs of tokens, in O(T^2) time and memory.

  Args:
    q: [B, T, H, K] queries. Head h reads key/value head h // (H/G).
    k: [B, T, G, K] keys.
    v: [B, T, G, V] values.
    codebook: [G, S, K]. None: as in `full_attention`, keys are not quantized, and tokens farther
      than M are masked if the attention is causal.
    mem_len: M.
    block_len: L. It changes gradients only: a key gets gradients from the queries of its own block
      and of later blocks that start at most M tokens after it. None: T.
    is_causal: False: each token attends the tokens before and after it.
    relative_keys: [M+1, G, K] r_0, ..., r_M; if not causal [2M+1, G, K] r_-M, ..., r_M. None: zero.
    content_bias: [H, K] u. None: zero.
    position_bias: [H, K] w. None: zero.
    segment_ids: [B, T] int32: tokens attend only tokens of their own segment. None: one segment.
    lengths: [B] int32: number of tokens before the padding at the end of each row. None: T.
    agg_cache: False masks tokens farther than M.

  Returns:
    [B, T, H, V].
  """
  (B, T, H, K), G = q.shape, k.shape[2]
  chex.assert_shape((k, v), [(B, T, G, K), (B, T, G, None)])
  u = jnp.zeros((H, K), q.dtype) if content_bias is None else content_bias
  w = jnp.zeros((H, K), q.dtype) if position_bias is None else position_bias
  r = jnp.zeros((1, G, K), q.dtype) if relative_keys is None else relative_keys
  L = T if block_len is None else block_len
  k_hat = k if codebook is None else quantize(k, codebook)[1]
  k_hat, v, r = (jnp.repeat(x, H // G, axis=-2) for x in (k_hat, v, r))

  i, j = jnp.arange(T)[:, None], jnp.arange(T)  # query, key
  is_near = abs(i - j) <= mem_len
  block_start = i // L * L
  in_window = (j >= block_start - mem_len) & (j < block_start + L + mem_len)

  # Content score (q_i + u)·k̂_j [B, H, T, T]. Outside of the window only the code of a key is
  # known, so the key gets no gradient from there.
  content = jnp.where(
    in_window,
    jnp.einsum("bihk,bjhk->bhij", q + u, k_hat),
    jnp.einsum("bihk,bjhk->bhij", q + u, jax.lax.stop_gradient(k_hat)),
  )
  # Position score (q_i + w)·r_{i-j} for distances up to M: by distance [B, H, T, M+1], then by key.
  position = jnp.einsum("bihk,dhk->bhid", q + w, r)
  d = jnp.clip(i - j if is_causal else i - j + mem_len, 0, r.shape[0] - 1)
  position = jnp.take_along_axis(position, jnp.broadcast_to(d, (B, H, T, T)), axis=-1)
  scores = K**-0.5 * (content + jnp.where(is_near, position, 0.0))

  visible = (i >= j) if is_causal else jnp.ones((T, T), bool)
  if not agg_cache or (codebook is None and is_causal):
    visible &= is_near
  visible = jnp.broadcast_to(visible, (B, 1, T, T))
  if segment_ids is not None:
    visible &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
  if lengths is not None:
    visible &= (j < lengths[:, None])[:, None, None]
  weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)
  return jnp.einsum("bhij,bjhv->bihv", weights, v)


def recurrent_attention(
  q: Array,
  k: Array,
  v: Array,
  codebook: Array,
  *,
  mem_len: int,
  relative_keys: Array,
  content_bias: Array,
  position_bias: Array,
) -> Array:
  """Computes `quadratic_attention` token by token, with a state whose size does not depend on T.

  The state is a window of M+1 tokens and a cache. All tokens of code s that have left the window
  have the same score. So they act like one token with key C_s, score K^(-1/2) (q_i + u)·C_s + log
  n_s, and their mean value m_s.

  Args:
    q: [B, T, H, K] queries.
    k: [B, T, G, K] keys.
    v: [B, T, G, V] values.
    codebook: [G, S, K].
    mem_len: M.
    relative_keys: [M+1, G, K] r_0, ..., r_M.
    content_bias: [H, K] u.
    position_bias: [H, K] w.

  Returns:
    [B, T, H, V].
  """
  (B, T, H, K), (G, S, _), V, M = q.shape, codebook.shape, v.shape[-1], mem_len
  chex.assert_shape((k, v), [(B, T, G, K), (B, T, G, V)])
  chex.assert_shape((relative_keys, content_bias), [(M + 1, G, K), (H, K)])
  codes, k_hat = quantize(k, codebook)
  counts, means = (jnp.zeros(shape, v.dtype) for shape in ((B, G, S), (B, G, S, V)))  # n, m
  outputs = []
  for i in range(T):
    # 1. The token at distance M + 1 leaves the window, and enters the cache under its code s:
    #    n_s <- n_s + 1,  m_s <- m_s + (v - m_s) / n_s.
    if i > M:
      evicted = i - M - 1
      is_code = jax.nn.one_hot(codes[:, evicted], S, dtype=v.dtype)  # [B, G, S]
      counts += is_code
      share = is_code / jnp.maximum(counts, 1.0)  # 1/n_s for the code of the token, else 0
      means += share[..., None] * (v[:, evicted, :, None] - means)
    # 2. Scores of the window, token by token, and of the cache, code by code.
    window = slice(max(i - M, 0), i + 1)
    distances = i - jnp.arange(T)[window]
    q_u, q_w = (  # q_i + u and q_i + w [B, G, P, K]
      (q[:, i] + bias).reshape(B, G, H // G, K) for bias in (content_bias, position_bias)
    )
    near = jnp.einsum("bgpk,bjgk->bgpj", q_u, k_hat[:, window])
    near += jnp.einsum("bgpk,jgk->bgpj", q_w, relative_keys[distances])
    far = jnp.einsum("bgpk,gsk->bgps", q_u, codebook)
    log_counts = jnp.where(counts > 0.0, jnp.log(jnp.maximum(counts, 1.0)), MASKED)
    # 3. One softmax over both.
    scores = [K**-0.5 * near, K**-0.5 * far + log_counts[:, :, None]]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    n_near = near.shape[-1]
    mixed = jnp.einsum("bgpj,bjgv->bgpv", weights[..., :n_near], v[:, window])
    mixed += jnp.einsum("bgps,bgsv->bgpv", weights[..., n_near:], means)
    outputs.append(mixed.reshape(B, H, V))
  return jnp.stack(outputs, axis=1)
