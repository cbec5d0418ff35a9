"""Sinusoids, and the layout of the Transformer-XL relative bias."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np

from tvq_haiku.types import Array


def sinusoids(positions: Array, *, width: int, lam: float) -> Array:
  """Sines, then cosines, of `positions` at wavelengths 2 pi lam^(2i/width).

  Exact to about 1e-4 up to 2^24: one product of position and frequency in float32 would be off by
  a radian there. So digits to base 256 turn by their own angle, reduced beforehand.

  Args:
    positions: [...] numbers of tokens, of any sign.
    width: D, even.
    lam: the longest wavelength is 2 pi lam^((D-2)/D).

  Returns:
    [..., D] float32.

  >>> sinusoids(jnp.array([0]), width=4, lam=1e5).tolist()
  [[0.0, 0.0, 1.0, 1.0]]
  """
  frequencies = float(lam) ** (-np.arange(0, width, 2) / width)
  sign, digits = jnp.sign(positions)[..., None], jnp.abs(positions)[..., None]
  angles = jnp.zeros((), jnp.float32)
  for place in range(4):
    turn = np.float32(np.remainder(256.0**place * frequencies, 2 * np.pi))
    angles += (digits % 256).astype(jnp.float32) * turn
    digits = digits // 256
  angles = sign * angles
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def align_distances(scores: Array, block_len: int) -> Array:
  """Lays scores by distance out along the window of their block.

  Query i of a block sits behind M tokens of memory and i of its own block, so its score for
  distance d belongs in column M + i - d. Padding each row to W + 1 columns and cutting the flat
  array into rows of W moves row i right by i columns, without a gather.

  Args:
    scores: [..., L, M+1] scores of distances M, M-1, ..., 0.
    block_len: L.

  Returns:
    [..., L, M+L]: zero in the i columns before distance M and in the L-1-i columns after 0.

  >>> align_distances(jnp.array([[2., 1.], [2., 1.]]), 2).tolist()
  [[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]]
  """
  chex.assert_axis_dimension(scores, -2, block_len)
  *batch, length, distances = scores.shape
  window = distances - 1 + length
  padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(0, window + 1 - distances)])
  flat = padded.reshape(*batch, length * (window + 1))
  return flat[..., : length * window].reshape(*batch, length, window)
