"""Sinusoids at large positions, and the alignment of relative scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.ops import positions


def test_sinusoids_at_ten_million():
  index = np.array([0, 1, 255, 256, 70_000, 9_999_999, 10_000_001, -3, -300])
  got = positions.sinusoids(jnp.asarray(index), width=64, lam=1e5)
  angles = index[:, None] / 1e5 ** (np.arange(0, 64, 2) / 64)
  want = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  np.testing.assert_allclose(got, want, atol=2e-4)
  np.testing.assert_allclose(got[:3], want[:3], atol=3e-5)


def test_aligned_distances_equal_a_gather():
  L, M = 5, 3
  scores = jax.random.normal(jax.random.key(0), (2, L, M + 1))  # of distances M, ..., 0
  got = positions.align_distances(scores, L)
  for i in range(L):
    for j in range(M + L):
      distance = M + i - j
      want = scores[:, i, M - distance] if 0 <= distance <= M else 0.0
      np.testing.assert_array_equal(got[:, i, j], np.broadcast_to(want, 2))


def test_scores_of_another_block_length_are_refused():
  with pytest.raises(AssertionError):
    positions.align_distances(jnp.zeros((2, 4, 3)), 5)
