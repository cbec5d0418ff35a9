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
  for dtype in (np.int32, np.uint16):
    assert not tvq.images_from_tokens(tokens.astype(dtype), height=2, width=2).any()


def test_a_grid_contains_every_image():
  images = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
  grid = np.asarray(tvq.image_grid(images))
  assert grid.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
  for i in range(5):
    top, left = 2 + 6 * (i // 3), 2 + 8 * (i % 3)
    assert (grid[top : top + 4, left : left + 6] == 10 * i).all()
  assert (grid == 255).all(axis=-1).sum() == grid[..., 0].size - 5 * 24
  assert tvq.image_grid(images, columns=5).size == (5 * 8 + 2, 8)


IMAGES = np.zeros((2, 4, 6, 3), np.uint8)


@pytest.mark.parametrize(
  "tokens, sizes, error, message",
  [
    (
      np.zeros((1, 11), int),
      {},
      ValueError,
      r"tokens must have shape \[n, 3·h·w=12\], got \(1, 11\)",
    ),
    (np.zeros((1, 12)), {}, TypeError, "tokens must be integer, got float"),
    (np.array([[0] * 11 + [259]]), {}, ValueError, r"tokens must lie in \[0, 259\), got 0...259"),
    (
      np.zeros((1, 0), int),
      dict(height=0),
      ValueError,
      "height=0 must be an integer of at least 1",
    ),
    (np.zeros((1, 12), int), dict(width=2.5), ValueError, "width=2.5 must be an integer"),
  ],
)
def test_bad_arguments_of_images_from_tokens_are_named(tokens, sizes, error, message):
  with pytest.raises(error, match=f"images_from_tokens: {message}"):
    tvq.images_from_tokens(tokens, **(dict(height=2, width=2) | sizes))


@pytest.mark.parametrize(
  "images, columns, error, message",
  [
    (IMAGES[0], None, ValueError, r"images must have shape \[n, h, w, c=3\], got \(4, 6, 3\)"),
    (IMAGES[..., :1], None, ValueError, r"images must have shape .* got \(2, 4, 6, 1\)"),
    (IMAGES[:0], None, ValueError, r"images must not be empty, got shape \(0, 4, 6, 3\)"),
    (IMAGES[:, :0], None, ValueError, r"images must not be empty, got shape \(2, 0, 6, 3\)"),
    (IMAGES / 255, None, TypeError, "images must be integer, got float"),
    (IMAGES > 0, None, TypeError, "images must be integer, got bool"),
    (IMAGES.astype(int) + 256, None, ValueError, r"images must lie in \[0, 255\], got 256...256"),
    (IMAGES, 0, ValueError, "columns=0 must be an integer of at least 1"),
    (IMAGES, 1.5, ValueError, "columns=1.5 must be an integer"),
  ],
)
def test_bad_arguments_of_image_grid_are_named(images, columns, error, message):
  with pytest.raises(error, match=f"image_grid: {message}"):
    tvq.image_grid(images, columns=columns)
