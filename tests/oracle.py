"""Attention over quantized keys in quadratic time, written for the eye: every pair of tokens."""

import jax
import jax.numpy as jnp


def attention(
  q,
  k,
  v,
  codebook,
  *,
  mem_len,
  block_len=None,
  is_causal=True,
  relative_keys=None,
  content_bias=None,
  position_bias=None,
  segment_ids=None,
  lengths=None,
  agg_cache=True,
):
  """What `vq_attention` computes from a cold state, and `full_attention` for `codebook=None`.

  q [B,T,H,K], k [B,T,G,K], v [B,T,G,V], codebook [G,S,K], relative_keys [M+1 or 2M+1,G,K]. A key
  gets a gradient from queries whose block of `block_len`, or the M tokens beside it, holds it.
  """
  B, T, H, K = q.shape
  G = k.shape[2]
  i, j = jnp.arange(T)[:, None], jnp.arange(T)[None]
  near = jnp.abs(i - j) <= mem_len
  start = i // (block_len or T) * (block_len or T)
  in_window = (j >= start - mem_len) & (j < start + (block_len or T) + mem_len)
  if codebook is not None:
    distances = ((k[:, :, :, None] - codebook[None, None]) ** 2).sum(-1)
    codes = jnp.argmin(distances, axis=-1)  # [B, T, G]
    nearest = jnp.stack([codebook[g][codes[:, :, g]] for g in range(G)], axis=2)
    k = jax.lax.stop_gradient(nearest - k) + k
  visible = jnp.broadcast_to(i >= j if is_causal else i < T, (B, T, T))
  if not agg_cache or (codebook is None and is_causal):
    visible = visible & near
  if segment_ids is not None:
    visible = visible & (segment_ids[:, :, None] == segment_ids[:, None])
  if lengths is not None:
    visible = visible & (jnp.arange(T) < lengths[:, None])[:, None]
  u = jnp.zeros((H, K)) if content_bias is None else content_bias
  w = jnp.zeros((H, K)) if position_bias is None else position_bias
  heads = []
  for h in range(H):
    g = h // (H // G)
    scores = jnp.where(
      in_window,
      jnp.einsum("bik,bjk->bij", q[:, :, h] + u[h], k[:, :, g]),
      jnp.einsum("bik,bjk->bij", q[:, :, h] + u[h], jax.lax.stop_gradient(k[:, :, g])),
    )
    if relative_keys is not None:
      bias = jnp.einsum("bik,dk->bid", q[:, :, h] + w[h], relative_keys[:, g])
      index = jnp.clip(i - j + (0 if is_causal else mem_len), 0, relative_keys.shape[0] - 1)
      bias = jnp.take_along_axis(bias, jnp.broadcast_to(index, (B, T, T)), axis=-1)
      scores += jnp.where(near & (is_causal & (i >= j) | (not is_causal)), bias, 0.0)
    # Finite, so that rows of padding have a gradient, too.
    weights = jax.nn.softmax(jnp.where(visible, K**-0.5 * scores, -1e30), axis=-1)
    heads.append(jnp.einsum("bij,bjv->biv", weights, v[:, :, g]))
  return jnp.stack(heads, axis=2)
