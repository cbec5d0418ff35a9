"""Images like those of downsampled ImageNet: npz archives of [n, 3·h·w] bytes, plane after plane."""

from __future__ import annotations

from collections.abc import Iterator
import os
import pathlib
import re
from typing import Any
import zipfile
import zlib

import numpy as np

from tvq_haiku.data.sources import base
from tvq_haiku.data.sources.base import Chunk

_CHUNK = 256  # images in memory at a time
_DAMAGE = (EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile)


class DownsampledImages:
  """Each image is a document of 3·h·w bytes, row by row, the channels of a pixel side by side.

  The first `n_train` images of train_data_batch_*.npz are for training, the others of them for
  validation; those of val_data.npz are for the test. There are no tokens but pixels.
  """

  name = "imagenet64"
  has_eos = False

  def __init__(self, data_dir: str | os.PathLike, *, n_train: int = 1_200_000, size: int = 64):
    """Finds the archives.

    Args:
      data_dir: where they are.
      n_train: how many of the training images are for training.
      size: height and width in pixels.
    """
    self._expected = (
      f"Expected: train_data_batch_1.npz ... train_data_batch_10.npz (1,281,167 images of {size} x "
      f"{size}, {3 * size * size:,} bytes each) and val_data.npz (50,000). They are published as "
      f"downsampled ImageNet, {size} x {size}, on image-net.org."
    )
    path = base.directory(data_dir, self._expected)
    archives = [f for f in path.glob("train_data_batch_*.npz") if re.search(r"_\d+\.npz$", f.name)]
    self._train = sorted(archives, key=lambda f: int(re.search(r"(\d+)\.npz$", f.name)[1]))
    self._test = path / "val_data.npz"
    for found, name in (
      (self._train, "train_data_batch_*.npz"),
      (self._test.is_file(), "val_data.npz"),
    ):
      if not found:
        raise ValueError(f"--data_dir={data_dir} has no {name}. {self._expected}")
    self.size = size
    self._n_train = n_train

  @property
  def document_len(self) -> int:
    """Bytes of an image."""
    return 3 * self.size**2

  def _parts(self, split: str) -> list[tuple[pathlib.Path, int, int]]:
    """The archives of a split, and from which image to which."""
    if split == "test":
      return [(self._test, 0, self._n_image(self._test))]
    parts, before = [], 0
    for file in self._train:
      n = self._n_image(file)
      first = min(max(self._n_train - before, 0), n)  # of those for validation
      start, end = (0, first) if split == "train" else (first, n)
      if start < end:
        parts.append((file, start, end))
      before += n
    if not parts:
      raise ValueError(
        f"the split {split!r} is empty: {before:,} images in {len(self._train)} archives "
        f"of {self._train[0].parent}, of which --n_train={self._n_train:,} are for training."
      )
    return parts

  def describe(self, split: str) -> Any:
    parts = self._parts(split)
    return [
      self.name,
      self.size,
      [part[1:] for part in parts],
      base.fingerprint([part[0] for part in parts]),
    ]

  def n_byte(self, split: str) -> int:
    return self.document_len * sum(end - start for _, start, end in self._parts(split))

  def read(self, split: str) -> Iterator[Chunk]:
    for file, start, end in self._parts(split):
      for planes in self._images(file, start, end):
        pixels = planes.reshape(-1, 3, self.size, self.size).transpose(0, 2, 3, 1)
        for image in np.ascontiguousarray(pixels):
          yield Chunk(image.tobytes(), ends=True, file=file)

  def _n_image(self, file: pathlib.Path) -> int:
    with self._member(file) as stream:
      return self._header(file, stream)

  def _images(self, file: pathlib.Path, start: int, end: int) -> Iterator[np.ndarray]:
    """Some images at a time, [n, 3·h·w] uint8: an archive may be larger than the memory."""
    row = self.document_len
    with self._member(file) as stream:
      self._header(file, stream)
      for first in range(0, end, _CHUNK):
        n = min(_CHUNK, end - first)
        try:
          content = stream.read(n * row)
        except _DAMAGE as error:
          raise ValueError(f"{file} is truncated or damaged: {error}") from error
        if len(content) != n * row:
          raise ValueError(f"{file} is truncated: it ends in image {first + len(content) // row}.")
        chunk = np.frombuffer(content, np.uint8).reshape(n, row)
        if first + n > start:
          yield chunk[max(start - first, 0) :]

  def _member(self, file: pathlib.Path) -> Any:
    try:
      return zipfile.ZipFile(file).open("data.npy")
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
      raise ValueError(
        f"{file} is not an npz archive with an array `data`: {error}. {self._expected}"
      ) from error

  def _header(self, file: pathlib.Path, stream: Any) -> int:
    """Reads past the header of the array and returns its number of images."""
    npy = np.lib.format
    try:
      version = npy.read_magic(stream)
      shape, by_column, dtype = (
        npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
      )(stream)
    except (ValueError, *_DAMAGE) as error:
      raise ValueError(f"{file} is truncated or damaged: {error}") from error
    if len(shape) != 2 or shape[1] != self.document_len or dtype != np.uint8 or by_column:
      raise ValueError(
        f"{file}: `data` is {dtype}{list(shape)}, not uint8[n, {self.document_len}]. "
        f"{self._expected}"
      )
    return shape[0]
