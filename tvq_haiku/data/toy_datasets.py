"""Writes small datasets in the formats of the real ones, for --smoke runs and tests.

Texts are excerpts of the embedded novels; images are synthetic. Files that exist are kept.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

from tvq_haiku.data import austen_novels
from tvq_haiku.utils import files


def write_text(
  directory: str | os.PathLike, *, n_byte: int = 60_000, name: str = "enwik8"
) -> pathlib.Path:
  """Writes a text file, for `sources.text`.

  Args:
    directory: created if missing.
    n_byte: size of the file in bytes.
    name: name of the file.

  Returns:
    The path of the file.
  """
  path = files.prepare_directory(directory) / name
  if not path.exists():
    files.write_atomically(path, b"".join(austen_novels.austen().values())[:n_byte])
  return path


def write_books(directory: str | os.PathLike, *, n_byte: int = 20_000) -> pathlib.Path:
  """Writes four books for training, one for validation and one for testing, for `sources.books`.

  Args:
    directory: created if missing.
    n_byte: size of each book in bytes.

  Returns:
    The directory.
  """
  root = files.prepare_directory(directory)
  splits = ["train"] * 4 + ["validation", "test"]
  metadata = ""
  for book_id, (split, (title, text)) in enumerate(
    zip(splits, sorted(austen_novels.austen().items()), strict=True), start=1
  ):
    path = files.prepare_directory(root / split) / f"{book_id}.txt"
    if not path.exists():
      files.write_atomically(path, text[:n_byte].decode(errors="ignore"))
    metadata += f"{book_id},{title},1815,\n"
  files.write_atomically(root / "metadata.csv", metadata)
  return root


def write_images(directory: str | os.PathLike, *, size: int = 8, n_image: int = 60) -> pathlib.Path:
  """Writes two archives for training and validation, and one for testing, for `sources.imagenet`.

  Args:
    directory: created if missing.
    size: height and width of an image in pixels.
    n_image: number of images for training and validation; the test archive has a sixth as many.

  Returns:
    The directory.
  """
  root = files.prepare_directory(directory)
  half = n_image // 2
  n_image_of = {
    "train_data_batch_1": half,
    "train_data_batch_2": n_image - half,
    "val_data": n_image // 6,
  }
  for seed, (name, n) in enumerate(n_image_of.items()):
    path = root / f"{name}.npz"
    if not path.exists():
      draft = path.with_name(f".{path.name}")
      np.savez_compressed(draft, data=_discs(n, size, seed=seed), labels=np.zeros(n, np.int64))
      os.replace(draft, path)
  return root


def _discs(n: int, size: int, *, seed: int) -> np.ndarray:
  """Draws n images, each of a disc on a background that brightens downwards.

  Returns:
    [n, 3·size·size] uint8, one channel plane after the other.
  """
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:size, :size] / size
  center, radius = rng.random((n, 2, 1, 1)), 0.2 + 0.3 * rng.random((n, 1, 1))
  is_inside = (y - center[:, 0]) ** 2 + (x - center[:, 1]) ** 2 < radius**2
  colors = rng.integers(0, 256, (2, n, 3, 1, 1))
  images = np.where(is_inside[:, None], colors[0], colors[1] * (0.5 + y / 2))
  return images.astype(np.uint8).reshape(n, -1)
