"""Converts tokens to images, and arranges images in a grid.

The tokens of an image are its bytes, row by row, with the three channels of a pixel adjacent, as
in `sources.imagenet`. Letters: n images, h rows, w columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import chex
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.utils import checks, optional, value_checks

if TYPE_CHECKING:
  import PIL.Image

_GAP = 2  # pixels between two images, and around the grid


def images_from_tokens(tokens: npt.ArrayLike, *, height: int, width: int) -> np.ndarray:
  """Converts tokens of the byte vocabulary to images.

  Args:
    tokens: [n, 3·h·w] integers; special tokens become the value 0.
    height: h in pixels.
    width: w in pixels.

  Returns:
    [n, h, w, 3] uint8.

  Raises:
    ValueError: an argument has a wrong shape or value.
    TypeError: `tokens` is not an array of integers.

  >>> images_from_tokens(np.arange(3, 15)[None], height=2, width=2)[0, 0].tolist()
  [[0, 1, 2], [3, 4, 5]]
  """
  height = value_checks.check_integer("images_from_tokens", "height", height)
  width = value_checks.check_integer("images_from_tokens", "width", width)
  tokens = np.asarray(tokens)
  axes = ("n", ("3·h·w", 3 * height * width))
  checks.check_arrays("images_from_tokens", chex.Dimensions(), tokens=(tokens, axes, jnp.integer))
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < ByteVocabulary.SIZE:
    raise ValueError(
      f"images_from_tokens: tokens must lie in [0, {ByteVocabulary.SIZE}), got "
      f"{tokens.min()}...{tokens.max()}."
    )
  values = np.maximum(tokens.astype(np.int32) - ByteVocabulary.OFFSET, 0).astype(np.uint8)
  return values.reshape(-1, height, width, 3)


def image_grid(images: npt.ArrayLike, *, columns: int | None = None) -> PIL.Image.Image:
  """Arranges images in a grid on a white background.

  Args:
    images: [n, h, w, 3] integers in [0, 255], at least one image.
    columns: number of images in a row of the grid; None: sqrt(n), rounded up.

  Returns:
    A `PIL.Image.Image`.

  Raises:
    ValueError: an argument has a wrong shape or value.
    TypeError: `images` is not an array of integers.
    ImportError: Pillow is missing.

  >>> image_grid(np.zeros((5, 8, 8, 3), np.uint8)).size
  (32, 22)
  """
  images = np.asarray(images)
  axes = ("n", "h", "w", ("c", 3))
  checks.check_arrays("image_grid", chex.Dimensions(), images=(images, axes, jnp.integer))
  if not images.size:
    raise ValueError(f"image_grid: images must not be empty, got shape {images.shape}.")
  if images.min() < 0 or images.max() > 255:
    raise ValueError(
      f"image_grid: images must lie in [0, 255], got {images.min()}...{images.max()}."
    )
  if columns is not None:
    columns = value_checks.check_integer("image_grid", "columns", columns)
  n, height, width, _ = images.shape
  columns = columns or math.ceil(math.sqrt(n))
  rows = -(-n // columns)
  grid = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 255, np.uint8)
  for i, image in enumerate(images):
    row, column = divmod(i, columns)
    top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
    grid[top : top + height, left : left + width] = image
  return optional.require("PIL.Image", extra="images", purpose="image files").fromarray(grid)
