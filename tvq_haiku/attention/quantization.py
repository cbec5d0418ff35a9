"""Vector quantization of keys: nearest codes, and a codebook that follows its keys.

The codebook is the ratio of two exponential moving averages, kept as parameters:
  C = c_sum / max(c_count, 0.01)                                          [G, S, K]
  c_sum   <- gamma c_sum   + (1 - gamma) sum of the keys of each code      [G, S, K]
  c_count <- gamma c_count + (1 - gamma) number of the keys of each code   [G, S]
The update is the gradient of a surrogate loss under plain SGD with learning rate 1, so that it
needs no state beside the parameters and is averaged over devices like any other gradient.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.ops import matmul
from tvq_haiku.types import Array

_MIN_COUNT = 0.01  # keeps C finite for codes that nothing uses


def nearest_codes(k: Array, codebook: Array) -> Array:
  """Index of the nearest code of each key, z_t = argmin_s |k_t - C_s|^2.

  Args:
    k: [B, T, G, K] keys, any floating type.
    codebook: [G, S, K] codes.

  Returns:
    [B, T, G] int32, in [0, S).

  >>> codes = jnp.array([[[0.0], [1.0]]])
  >>> nearest_codes(jnp.array([[[[0.2]], [[0.9]]]]), codes).squeeze().tolist()
  [0, 1]
  """
  dims = chex.Dimensions()
  dims["BTGK"] = k.shape
  dims["GSK"] = codebook.shape
  k = jax.lax.stop_gradient(k).astype(jnp.float32)
  codebook = jax.lax.stop_gradient(codebook).astype(jnp.float32)
  # TF32 would move keys across cell boundaries: CPU and GPU would choose other codes.
  # |k|^2 is the same for every code, so the argmin needs only the rest of the square.
  dots = matmul.dots_per_head(k.swapaxes(1, 2), codebook, precision=matmul.EXACT)
  distances = jnp.sum(codebook**2, axis=-1)[:, None] - 2.0 * dots  # [B, G, T, S]
  return jnp.argmin(distances, axis=-1).astype(jnp.int32).swapaxes(1, 2)


def codebook_of(c_sum: Array, c_count: Array) -> Array:
  """C [G, S, K] in float32, without gradient, from its moments [G, S, K] and [G, S]."""
  return jax.lax.stop_gradient(c_sum / jnp.maximum(c_count, _MIN_COUNT)[..., None])


def look_up(codes: Array, codebook: Array) -> Array:
  """C_z: the [B, T, G, K] codes' vectors for `codes` [B, T, G] of a `codebook` [G, S, K]."""
  return jax.vmap(lambda c, z: c[z], in_axes=(0, 2), out_axes=2)(codebook, codes)


def straight_through(k: Array, quantized: Array) -> Array:
  """`quantized` in value, `k` in gradient: sg(C_z) + (k - sg(k))."""
  return jax.lax.stop_gradient(quantized) + (k - jax.lax.stop_gradient(k))


def commit_loss(k: Array, quantized: Array, mask: Array) -> Array:
  """Mean over all B·T tokens of mask · |k - sg(C_z)|^2, summed over heads.

  Args:
    k: [B, T, G, K] keys.
    quantized: [B, T, G, K] their codes.
    mask: [B, T] weights; masked tokens stay in the denominator.
  """
  squares = (k.astype(jnp.float32) - jax.lax.stop_gradient(quantized).astype(jnp.float32)) ** 2
  return jnp.mean(mask.astype(jnp.float32) * jnp.sum(squares, axis=(2, 3)))


def code_statistics(k: Array, codes: Array, mask: Array, n_code: int) -> tuple[Array, Array]:
  """Sum [G, S, K] and number [G, S] of the unmasked keys of each code, in float32."""
  G = k.shape[2]
  # [G, B·T, ...], so that each head is one product.
  codes, mask = codes.reshape(-1, G).T, mask.astype(jnp.float32).reshape(-1, 1)
  weights = jax.nn.one_hot(codes, n_code, dtype=jnp.float32) * mask
  keys = k.astype(jnp.float32).reshape(-1, G, k.shape[-1]).swapaxes(0, 1)
  return matmul.pool(weights, keys, precision=matmul.EXACT), jnp.sum(weights, axis=1)
