"""Images from tokens, and grids of images."""

import numpy as np
import pytest

import tvq_haiku as tvq


def test_pixels_are_restored_from_tokens():
  pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
  tokens = pixels.reshape(3, -1).astype(np.int32) + 3
  images = tvq.images_from_tokens(tokens, height=4, width=5)
  np.testing.assert_array_equal(images, pixels)
  assert images.dtype == np.uint8


def test_special_tokens_become_zero():
  tokens = np.arange(12)[None] % 3
  assert not tvq.images_from_tokens(tokens, height=2, width=2).any()


def test_a_grid_contains_every_image():
  images = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
  grid = np.asarray(tvq.image_grid(images))
  assert grid.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
  for i in range(5):
    top, left = 2 + 6 * (i // 3), 2 + 8 * (i % 3)
    assert (grid[top : top + 4, left : left + 6] == 10 * i).all()
  assert (grid == 255).all(axis=-1).sum() == grid[..., 0].size - 5 * 24
  assert tvq.image_grid(images, columns=5).size == (5 * 8 + 2, 8)


def test_bad_arrays_are_named():
  with pytest.raises(ValueError, match=r"tokens must have shape \[n, 3·h·w=12\], got \(1, 11\)"):
    tvq.images_from_tokens(np.zeros((1, 11), np.int32), height=2, width=2)
  with pytest.raises(ValueError, match=r"\[0, 259\), got 0...259"):
    tvq.images_from_tokens(np.array([[0] * 11 + [259]]), height=2, width=2)
  with pytest.raises(ValueError, match=r"images must have shape \[n, h, w, c\], got \(4, 6, 3\)"):
    tvq.image_grid(np.zeros((4, 6, 3), np.uint8))
