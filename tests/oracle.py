"""Attention over quantized keys in quadratic time, written for the eye: every pair of tokens."""

import jax
import jax.numpy as jnp


def attention(q, k, v, codebook, *, mem_len, relative_keys=None, content_bias=None,
              position_bias=None, doc_ids=None, agg_cache=True, block_len=None):
  """What `vq_attention` computes from a cold state, for a batch without padding.

  q [B,T,H,K], k [B,T,G,K], v [B,T,G,V], codebook [G,S,K], relative_keys [M+1,H,K]. Keys get a
  gradient from queries whose block of `block_len`, or the M tokens before it, holds them.
  """
  B, T, H, K = q.shape
  G = k.shape[2]
  distances = ((k[:, :, :, None] - codebook[None, None]) ** 2).sum(-1)
  codes = jnp.argmin(distances, axis=-1)  # [B, T, G]
  nearest = jnp.stack([codebook[g][codes[:, :, g]] for g in range(G)], axis=2)
  k = jax.lax.stop_gradient(nearest - k) + k
  i, j = jnp.arange(T)[:, None], jnp.arange(T)[None]
  in_window = j >= i // (block_len or T) * (block_len or T) - mem_len
  u = jnp.zeros((H, K)) if content_bias is None else content_bias
  w = jnp.zeros((H, K)) if position_bias is None else position_bias
  heads = []
  for h in range(H):
    g = h // (H // G)
    scores = jnp.where(
        in_window,
        jnp.einsum("bik,bjk->bij", q[:, :, h] + u[h], k[:, :, g]),
        jnp.einsum("bik,bjk->bij", q[:, :, h] + u[h], jax.lax.stop_gradient(k[:, :, g])))
    if relative_keys is not None:
      bias = jnp.einsum("bik,dk->bid", q[:, :, h] + w[h], relative_keys[:, h])
      near = jnp.clip(i - j, 0, mem_len)
      bias = jnp.take_along_axis(bias, jnp.broadcast_to(near, (B, T, T)), axis=-1)
      scores += jnp.where((i - j <= mem_len) & (i >= j), bias, 0.0)
    visible = i >= j
    if not agg_cache:
      visible = visible & (i - j <= mem_len)
    if doc_ids is not None:
      visible = visible & (doc_ids[:, :, None] == doc_ids[:, None])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    heads.append(jnp.einsum("bij,bjv->biv", weights, v[:, :, g]))
  return jnp.stack(heads, axis=2)
