"""Images from tokens, and grids of them."""

import numpy as np
import pytest

import tvq_haiku as tvq


def test_pixels_come_back():
  pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
  tokens = pixels.reshape(3, -1).astype(np.int32) + 3
  np.testing.assert_array_equal(tvq.images_from_tokens(tokens, height=4, width=5), pixels)
  assert not tvq.images_from_tokens(np.ones((1, 12), np.int32), height=2, width=2).any()


def test_a_grid_holds_every_image():
  images = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
  page = np.asarray(tvq.image_grid(images))
  assert page.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
  for i in range(5):
    top, left = 2 + 6 * (i // 3), 2 + 8 * (i % 3)
    assert (page[top : top + 4, left : left + 6] == 10 * i).all()
  assert (page == 255).all(axis=-1).sum() == page[..., 0].size - 5 * 24
  assert tvq.image_grid(images, columns=5).size == (5 * 8 + 2, 8)


def test_what_is_no_image():
  with pytest.raises(ValueError, match=r"\[n, 12\] for 2 x 2 pixels, got \(1, 11\)"):
    tvq.images_from_tokens(np.zeros((1, 11), np.int32), height=2, width=2)
  with pytest.raises(ValueError, match=r"\[0, 259\), got 0...259"):
    tvq.images_from_tokens(np.array([[0] * 11 + [259]]), height=2, width=2)
