"""Images as tokens: row by row, the channels of a pixel one after the other.

Letters: n images, h rows, w columns, 3 channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.utils import optional

_GAP = 2  # pixels between two images


def images_from_tokens(tokens: np.ndarray, *, height: int, width: int) -> np.ndarray:
  """[n, 3·h·w] tokens -> [n, h, w, 3] uint8; special tokens become 0.

  >>> images_from_tokens(np.arange(3, 15)[None], height=2, width=2)[0, 0].tolist()
  [[0, 1, 2], [3, 4, 5]]
  """
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or tokens.shape[1] != 3 * height * width:
    raise ValueError(
      f"images_from_tokens: tokens must have shape [n, {3 * height * width}] for "
      f"{height} x {width} pixels, got {tokens.shape}."
    )
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < ByteVocabulary.SIZE:
    raise ValueError(
      f"images_from_tokens: tokens must lie in [0, {ByteVocabulary.SIZE}), got "
      f"{tokens.min()}...{tokens.max()}."
    )
  return np.maximum(tokens - 3, 0).astype(np.uint8).reshape(-1, height, width, 3)


def image_grid(images: np.ndarray, *, columns: int | None = None) -> Any:
  """A `PIL.Image.Image` of all images [n, h, w, 3] uint8 side by side on white; None: a square."""
  n, height, width, _ = images.shape
  columns = columns or math.ceil(math.sqrt(n))
  rows = -(-n // columns)
  page = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 255, np.uint8)
  for i, image in enumerate(images):
    top, left = (
      _GAP + place * (size + _GAP) for place, size in zip(divmod(i, columns), (height, width))
    )
    page[top : top + height, left : left + width] = image
  return optional.require("PIL.Image", extra="images", purpose="image files").fromarray(page)
