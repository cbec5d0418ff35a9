"""Sinusoids, and the layout of the Transformer-XL relative bias."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np

from tvq_haiku.types import Array


def sinusoids(positions: Array, *, width: int, lam: float) -> Array:
  """Computes sinusoids of positions: width/2 sines, then width/2 cosines.

  Sine i and cosine i have the wavelength 2 pi lam^(2i/width). Angles are exact to about 1e-4 for
  positions up to 2^24, where the float32 product of position and frequency would be off by up to a
  radian. For this, the angle is a sum over the base-256 digits of the position: the angle of
  256^digit is reduced modulo 2 pi in float64 beforehand.

  Args:
    positions: [...] integers of any sign.
    width: number of components; even.
    lam: base of the wavelengths.

  Returns:
    [..., width] float32.

  >>> sinusoids(jnp.array([0]), width=4, lam=1e5).tolist()
  [[0.0, 0.0, 1.0, 1.0]]
  """
  chex.assert_type(positions, int)
  frequencies = float(lam) ** (-np.arange(0, width, 2) / width)
  sign, rest = jnp.sign(positions)[..., None], jnp.abs(positions)[..., None]
  angles = jnp.zeros((), jnp.float32)
  for digit in range(4):
    angle = np.float32(np.remainder(256.0**digit * frequencies, 2 * np.pi))
    angles += (rest % 256).astype(jnp.float32) * angle
    rest = rest // 256
  angles = sign * angles
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def align_distances(scores: Array, block_len: int) -> Array:
  """Moves each score for a distance to the column of the key at that distance (relative shift).

  Query i of a block follows M tokens of memory and i tokens of its own block. So its score for
  distance d belongs in column M + i - d of the window. Padding each row to W + 1 columns, and
  reshaping the flattened array to rows of W, moves row i right by i columns without a gather.

  Args:
    scores: [..., L, M+1] scores for the distances M, M-1, ..., 0.
    block_len: L.

  Returns:
    [..., L, W] with W = M + L: zero in the i columns before distance M and in the L-1-i columns
    after distance 0.

  >>> align_distances(jnp.array([[2., 1.], [2., 1.]]), 2).tolist()
  [[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]]
  """
  chex.assert_axis_dimension(scores, -2, block_len)
  *batch, L, n_distance = scores.shape
  W = n_distance - 1 + L
  padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, W + 1 - n_distance)])
  flat = padded.reshape(*batch, L * (W + 1))
  return flat[..., : L * W].reshape(*batch, L, W)
