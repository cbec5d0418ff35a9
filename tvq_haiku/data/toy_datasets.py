"""Data sets of seconds, in the formats of the large ones: for smoke runs and tests.

Texts are cut from the embedded novels; images are drawn.
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
  """A file of `n_byte` bytes."""
  path = files.prepare_directory(directory) / name
  if not path.exists():
    files.write_atomically(path, b"".join(austen_novels.austen().values())[:n_byte])
  return path


def write_books(directory: str | os.PathLike, *, n_byte: int = 20_000) -> pathlib.Path:
  """Four books for training, one for validation and one for the test, of `n_byte` bytes each."""
  root = files.prepare_directory(directory)
  splits = ["train"] * 4 + ["validation", "test"]
  rows = []
  for i, (split, (title, text)) in enumerate(zip(splits, sorted(austen_novels.austen().items()))):
    path = files.prepare_directory(root / split) / f"{i + 1}.txt"
    if not path.exists():
      files.write_atomically(path, text[:n_byte].decode(errors="ignore"))
    rows.append(f"{i + 1},{title},1815,\n")
  files.write_atomically(root / "metadata.csv", "".join(rows))
  return root


def write_images(directory: str | os.PathLike, *, size: int = 8, n_image: int = 60) -> pathlib.Path:
  """`n_image` images for training and validation in two archives, and a sixth as many for the test."""
  root = files.prepare_directory(directory)
  half = n_image // 2
  for i, (name, n) in enumerate(
    {
      "train_data_batch_1": half,
      "train_data_batch_2": n_image - half,
      "val_data": n_image // 6,
    }.items()
  ):
    path = root / f"{name}.npz"
    if not path.exists():
      draft = path.with_name(f".{path.name}")
      np.savez_compressed(draft, data=_discs(n, size, seed=i), labels=np.zeros(n, np.int64))
      os.replace(draft, path)
  return root


def _discs(n: int, size: int, *, seed: int) -> np.ndarray:
  """[n, 3·size·size] uint8, plane after plane: a disc of one colour on a background that fades."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:size, :size] / size
  centre, radius = rng.random((n, 2, 1, 1)), 0.2 + 0.3 * rng.random((n, 1, 1))
  inside = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2
  colours = rng.integers(0, 256, (2, n, 3, 1, 1))
  images = np.where(inside[:, None], colours[0], colours[1] * (0.5 + y / 2))
  return images.astype(np.uint8).reshape(n, -1)
