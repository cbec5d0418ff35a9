"""Vector quantization of keys: nearest codes, straight-through gradients, statistics.

The codebook is the ratio of two exponential moving averages:

  C = c_sum / max(c_count, 0.01)                                          [G, S, K]
  c_sum   <- gamma c_sum   + (1 - gamma) sum of the keys of each code      [G, S, K]
  c_count <- gamma c_count + (1 - gamma) number of the keys of each code   [G, S]

`model/quantizer.py` keeps both averages as parameters.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.ops import matmul
from tvq_haiku.types import Array
from tvq_haiku.utils import checks

_MIN_COUNT = 0.01  # keeps C finite for codes that no key uses


def nearest_codes(k: Array, codebook: Array) -> Array:
  """Finds the nearest code of each key: z_t = argmin_s |k_t - C_s|^2.

  Args:
    k: [B, T, G, K] keys of any floating dtype.
    codebook: [G, S, K] codes.

  Returns:
    [B, T, G] int32, in [0, S).

  Raises:
    ValueError, TypeError: a shape or dtype does not fit.

  >>> codebook = jnp.array([[[0.0], [1.0]]])
  >>> nearest_codes(jnp.array([[[[0.2]], [[0.9]]]]), codebook).squeeze().tolist()
  [0, 1]
  """
  real = jnp.floating
  dims = chex.Dimensions()
  checks.check_arrays("nearest_codes", dims, k=(k, "BTGK", real), codebook=(codebook, "GSK", real))
  k = jax.lax.stop_gradient(k).astype(jnp.float32)
  codebook = jax.lax.stop_gradient(codebook).astype(jnp.float32)
  # Full float32 precision: with TF32, a GPU would choose other codes than a CPU for keys that are
  # almost as near to a second code. |k|^2 is the same for all codes, so the argmin can do without.
  dots = matmul.dots_per_head(k.swapaxes(1, 2), codebook, precision=matmul.EXACT)  # bgtk,gsk->bgts
  distances = jnp.sum(codebook**2, axis=-1)[:, None] - 2.0 * dots  # |C|^2 - 2 k·C [B, G, T, S]
  return jnp.argmin(distances, axis=-1).astype(jnp.int32).swapaxes(1, 2)


def codebook_from_averages(c_sum: Array, c_count: Array) -> Array:
  """Returns C [G, S, K] in float32, without gradient, from c_sum [G, S, K] and c_count [G, S]."""
  chex.assert_equal_shape_prefix((c_sum, c_count), c_count.ndim)
  return jax.lax.stop_gradient(c_sum / jnp.maximum(c_count, _MIN_COUNT)[..., None])


def look_up(codes: Array, codebook: Array) -> Array:
  """Returns the vectors C_z [B, T, G, K] of codes [B, T, G] in a codebook [G, S, K]."""
  chex.assert_shape(codes, (None, None, codebook.shape[0]))
  return jax.vmap(lambda c, z: c[z], in_axes=(0, 2), out_axes=2)(codebook, codes)


def straight_through(k: Array, quantized: Array) -> Array:
  """Returns `quantized`, with the gradient of `k`: sg(C_z) + (k - sg(k))."""
  chex.assert_equal_shape((k, quantized))
  return jax.lax.stop_gradient(quantized) + (k - jax.lax.stop_gradient(k))


def commit_loss(k: Array, quantized: Array, mask: Array) -> Array:
  """Computes the mean over all B·T tokens of mask · |k - sg(C_z)|^2, summed over heads.

  Args:
    k: [B, T, G, K] keys.
    quantized: [B, T, G, K] nearest codes C_z.
    mask: [B, T] weights. The denominator is B·T also if some are zero.

  Returns:
    [] f32.
  """
  chex.assert_equal_shape((k, quantized))
  chex.assert_shape(mask, k.shape[:2])
  squares = (k.astype(jnp.float32) - jax.lax.stop_gradient(quantized).astype(jnp.float32)) ** 2
  return jnp.mean(mask.astype(jnp.float32) * jnp.sum(squares, axis=(2, 3)))


def code_statistics(k: Array, codes: Array, mask: Array, n_code: int) -> tuple[Array, Array]:
  """Sums and counts the keys of each code.

  Args:
    k: [B, T, G, K] keys.
    codes: [B, T, G] int32.
    mask: [B, T] weights.
    n_code: S.

  Returns:
    The weighted sum of the keys of each code [G, S, K] and the sum of their weights [G, S], both
    float32.
  """
  B, T, G, K = k.shape
  chex.assert_shape((codes, mask), [(B, T, G), (B, T)])
  codes, mask = codes.reshape(B * T, G).T, mask.astype(jnp.float32).reshape(B * T, 1)
  weights = jax.nn.one_hot(codes, n_code, dtype=jnp.float32) * mask  # [G, B·T, S]
  keys = k.astype(jnp.float32).reshape(B * T, G, K).swapaxes(0, 1)
  sums = matmul.pool(weights, keys, precision=matmul.EXACT)  # gts,gtk->gsk
  return sums, jnp.sum(weights, axis=1)
