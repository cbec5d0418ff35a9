"""Images in the format of downsampled ImageNet: npz archives of uint8[n, 3·h·w], planar RGB."""

from __future__ import annotations

from collections.abc import Iterator
import os
import pathlib
import re
from typing import IO
import zipfile
import zlib

import numpy as np

from tvq_haiku.data.sources import base
from tvq_haiku.data.sources.base import JSON, Chunk, FileRange

_CHUNK = 256  # images in memory at a time
_DAMAGED_ARCHIVE = (EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile)


class DownsampledImages:
  """A dataset of images, each of which is a document of 3·h·w bytes.

  The pixels of an image are in rows, and the channels of a pixel are adjacent. The first `n_train`
  images of train_data_batch_*.npz are the training split and the remaining ones are the validation
  split; val_data.npz is the test split. Tokens are bytes, without special tokens.
  """

  name = "imagenet64"
  has_eos = False

  def __init__(self, data_dir: str | os.PathLike, *, n_train: int = 1_200_000, size: int = 64):
    """Finds the archives; their content is checked when it is read.

    Args:
      data_dir: the directory of the archives.
      n_train: number of images in the training split.
      size: height and width of an image in pixels.

    Raises:
      ValueError: an archive is missing, or is a broken link.
      OSError: the directory cannot be read.
    """
    self._expected = (
      f"Expected: train_data_batch_1.npz ... train_data_batch_10.npz (1,281,167 images of {size} x "
      f"{size}, {3 * size * size:,} bytes each) and val_data.npz (50,000). They are published as "
      f"downsampled ImageNet, {size} x {size}, on image-net.org."
    )
    path = base.existing_path(data_dir, self._expected)
    archives = base.find_files(path, "train_data_batch_*.npz")
    archives = [file for file in archives if re.search(r"_\d+\.npz$", file.name)]
    self._train_files = sorted(archives, key=lambda f: int(re.search(r"(\d+)\.npz$", f.name)[1]))
    self._test_file = path / "val_data.npz"
    if not self._train_files:
      raise ValueError(f"--data_dir={data_dir} has no train_data_batch_*.npz. {self._expected}")
    if not self._test_file.is_file():
      raise ValueError(f"--data_dir={data_dir} has no val_data.npz. {self._expected}")
    self.size = size
    self._n_train = n_train

  @property
  def document_len(self) -> int:
    """Bytes per image."""
    return 3 * self.size**2

  def describe(self, split: str) -> list[JSON]:
    """Returns JSON that changes whenever the archives of the split, or its bounds, change."""
    return [self.name, self.size, *base.describe_ranges(self._ranges(split))]

  def n_byte(self, split: str) -> int:
    """Returns the number of bytes in the split."""
    return self.document_len * sum(r.end - r.start for r in self._ranges(split))

  def read(self, split: str) -> Iterator[Chunk]:
    """Yields each image of the split as one chunk.

    Raises:
      ValueError: an archive is damaged or has a different format.
      OSError: an archive cannot be opened.
    """
    for file, start, end in self._ranges(split):
      for planes in self._read_images(file, start, end):
        pixels = planes.reshape(-1, 3, self.size, self.size).transpose(0, 2, 3, 1)
        for image in np.ascontiguousarray(pixels):
          yield Chunk(image.tobytes(), is_last=True, file=file)

  def _ranges(self, split: str) -> list[FileRange]:
    """Returns the ranges of images, per archive, that make up a split."""
    if split == "test":
      return [FileRange(self._test_file, 0, self._n_image(self._test_file))]
    ranges, n_before = [], 0
    for file in self._train_files:
      n_image = self._n_image(file)
      n_train = min(max(self._n_train - n_before, 0), n_image)  # of this archive
      start, end = (0, n_train) if split == "train" else (n_train, n_image)
      if start < end:
        ranges.append(FileRange(file, start, end))
      n_before += n_image
    if not ranges:
      raise ValueError(
        f"the split {split!r} is empty: {self._train_files[0].parent} has {n_before:,} images in "
        f"{len(self._train_files)} archives, and the first --n_train={self._n_train:,} are for "
        "training: choose a different --n_train."
      )
    return ranges

  def _n_image(self, file: pathlib.Path) -> int:
    with self._open_array(file) as stream:
      return self._read_header(file, stream)

  def _read_images(self, file: pathlib.Path, start: int, end: int) -> Iterator[np.ndarray]:
    """Yields images `start` to `end` as uint8[n, 3·h·w]; the archive may not fit into memory."""
    image_len = self.document_len
    with self._open_array(file) as stream:
      self._read_header(file, stream)
      for first in range(0, end, _CHUNK):
        n = min(_CHUNK, end - first)
        try:
          content = stream.read(n * image_len)
        except _DAMAGED_ARCHIVE as error:
          raise ValueError(f"{file} is truncated or damaged: {error}") from error
        if len(content) != n * image_len:
          raise ValueError(
            f"{file} is truncated: it ends in image {first + len(content) // image_len}."
          )
        images = np.frombuffer(content, np.uint8).reshape(n, image_len)
        if first + n > start:
          yield images[max(start - first, 0) :]

  def _open_array(self, file: pathlib.Path) -> IO[bytes]:
    try:
      return zipfile.ZipFile(file).open("data.npy")
    except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
      raise ValueError(
        f"{file} is not an npz archive with an array `data`: {error}. {self._expected}"
      ) from error

  def _read_header(self, file: pathlib.Path, stream: IO[bytes]) -> int:
    """Reads past the header of the array and returns its number of images."""
    npy = np.lib.format
    try:
      version = npy.read_magic(stream)
      read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
      shape, is_fortran_order, dtype = read_header(stream)
    except (ValueError, *_DAMAGED_ARCHIVE) as error:
      raise ValueError(f"{file} is truncated or damaged: {error}") from error
    if len(shape) != 2 or shape[1] != self.document_len or dtype != np.uint8 or is_fortran_order:
      order = " in Fortran order" if is_fortran_order else ""
      raise ValueError(
        f"{file}: `data` is {dtype}{list(shape)}{order}, not uint8[n, {self.document_len}]. "
        f"{self._expected}"
      )
    return shape[0]
