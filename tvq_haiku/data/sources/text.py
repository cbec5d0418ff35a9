"""Text as bytes: the published enwik8, and text files of the user."""

from __future__ import annotations

import bz2
from collections.abc import Iterator
import gzip
import itertools
import lzma
import os
import pathlib
from typing import BinaryIO
import zipfile
import zlib

import numpy as np

from tvq_haiku.data.sources import base
from tvq_haiku.data.sources.base import JSON, Chunk, FileRange

_CHUNK = 1 << 24  # bytes
_LONGEST_LINE = 1 << 16  # bytes; longer lines may be divided between two splits
_DAMAGED_ARCHIVE = (  # what the decompressors raise
  EOFError,
  OSError,
  RuntimeError,
  zipfile.BadZipFile,
  zlib.error,
  lzma.LZMAError,
)
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _split_bounds(n_byte: int) -> dict[str, tuple[int, int]]:
  """Divides `n_byte` bytes into 90 % training, 5 % validation and 5 % test data.

  >>> _split_bounds(100)
  {'train': (0, 90), 'validation': (90, 95), 'test': (95, 100)}
  """
  bounds = (0, n_byte * 90 // 100, n_byte * 95 // 100, n_byte)
  return dict(zip(base.SPLITS, itertools.pairwise(bounds), strict=True))


class Enwik8:
  """The first 100,000,000 bytes of a Wikipedia dump, plain or compressed; or another single file.

  The first 90 % of the bytes are the training split, the next 5 % the validation split and the
  last 5 % the test split. Tokens are bytes, without special tokens: each split is one document.
  """

  name = "enwik8"
  has_eos = False

  def __init__(self, data_dir: str | os.PathLike, *, n_byte: int = 100_000_000):
    """Finds the file; its content is checked when it is read.

    Args:
      data_dir: the file, or a directory with enwik8 or enwik8.zip, .gz, .bz2 or .xz.
      n_byte: the required size of the decompressed file in bytes.

    Raises:
      ValueError: the file is missing.
    """
    self._expected = (
      f"Expected: the file enwik8, {n_byte:,} bytes, or enwik8.zip, or enwik8.gz. It is published "
      "with the Large Text Compression Benchmark and the Hutter Prize."
    )
    path = base.existing_path(data_dir, self._expected)
    if path.is_dir():
      candidates = [path / f"enwik8{suffix}" for suffix in ("", ".zip", *_OPENERS)]
      path = next((file for file in candidates if file.is_file()), None)
      if path is None:
        raise ValueError(f"--data_dir={data_dir} contains no enwik8. {self._expected}")
    self._file = path
    self._size = n_byte

  def describe(self, split: str) -> list[JSON]:
    """Returns JSON that changes whenever the file or its expected size changes."""
    return [self.name, split, self._size, *base.fingerprint([self._file])]

  def n_byte(self, split: str) -> int:
    """Returns the number of bytes in the split."""
    start, end = _split_bounds(self._size)[split]
    return end - start

  def read(self, split: str) -> Iterator[Chunk]:
    """Yields the split as the chunks of one document.

    Raises:
      ValueError: the file is damaged or has a different size, or the split is empty.
      OSError: the file cannot be opened.
    """
    start, end = _split_bounds(self._size)[split]
    content = self._read_file()
    if start == end:
      raise ValueError(
        f"{self._file}: {self._size} bytes leave none for the split {split!r}: use a larger file."
      )
    for first in range(start, end, _CHUNK):
      last = min(first + _CHUNK, end)
      yield Chunk(content[first:last], is_last=last == end, file=self._file)

  def _read_file(self) -> bytes:
    try:
      with self._open() as stream:
        content = stream.read(self._size + 1)
    except _DAMAGED_ARCHIVE as error:
      if isinstance(error, OSError) and error.filename:
        raise  # the file cannot be opened
      raise ValueError(f"{self._file} is truncated or damaged: {error}") from error
    if len(content) != self._size:
      size = f"{len(content):,}" if len(content) < self._size else f"more than {self._size:,}"
      raise ValueError(
        f"{self._file} has {size} bytes, not {self._size:,}: it is truncated, or "
        f"a different file. {self._expected}"
      )
    return content

  def _open(self) -> BinaryIO:
    if self._file.suffix != ".zip":
      return _OPENERS.get(self._file.suffix, open)(self._file, "rb")
    archive = zipfile.ZipFile(self._file)
    if "enwik8" not in archive.namelist():
      raise ValueError(
        f"{self._file} has no member enwik8, but {archive.namelist()[:5]}. {self._expected}"
      )
    return archive.open("enwik8")


class TextFiles:
  """A text file, or all files below a directory in the order of their names.

  Each file is a document. The first 90 % of all bytes are the training split, the next 5 % the
  validation split and the last 5 % the test split. A file that contains the end of a split is
  divided at the next line break, and each part is a document. If the directory has the
  subdirectories train, validation and test, these are the splits instead. Files and directories
  whose names begin with a dot are ignored; links are followed.
  """

  name = "text"
  has_eos = True

  def __init__(self, data_dir: str | os.PathLike):
    """Lists the files.

    Args:
      data_dir: a text file, or a directory of text files.

    Raises:
      ValueError: there is no text, or a link is broken or leads to a directory that contains it.
      OSError: a directory cannot be read.
    """
    expected = "Expected: a text file, or a directory of text files."
    self._path = base.existing_path(data_dir, expected)
    self._has_split_directories = all((self._path / split).is_dir() for split in base.SPLITS)
    self._files = base.files_below(self._path) if self._path.is_dir() else [self._path]
    if not sum(file.stat().st_size for file in self._files):
      raise ValueError(f"--data_dir={data_dir} contains no text. {expected}")

  def describe(self, split: str) -> list[JSON]:
    """Returns JSON that changes whenever the files of the split, or its bounds, change."""
    return [self.name, *base.describe_ranges(self._ranges(split))]

  def n_byte(self, split: str) -> int:
    """Returns the number of bytes in the split."""
    return sum(r.end - r.start for r in self._ranges(split))

  def read(self, split: str) -> Iterator[Chunk]:
    """Yields the documents of the split; no chunk ends inside a UTF-8 character.

    Raises:
      ValueError: a file became shorter while it was read.
      OSError: a file cannot be read.
    """
    return _read_ranges(self._ranges(split))

  def sample(self, n_byte: int, *, seed: int) -> Iterator[str]:
    """Yields non-empty lines from files of the training split in random order.

    Args:
      n_byte: maximum number of bytes to read, including line breaks.
      seed: determines the order of the files.
    """
    ranges = self._ranges("train")
    order = np.random.default_rng(seed).permutation(len(ranges))
    return base.lines(_read_ranges([ranges[i] for i in order]), n_byte)

  def _ranges(self, split: str) -> list[FileRange]:
    """Returns the byte ranges of the files that make up a split."""
    if self._has_split_directories:
      files = [file for file in self._files if (self._path / split) in file.parents]
      return [FileRange(file, 0, file.stat().st_size) for file in files]
    sizes = [file.stat().st_size for file in self._files]
    split_start, split_end = _split_bounds(sum(sizes))[split]
    ranges, n_before = [], 0
    for file, size in zip(self._files, sizes, strict=True):
      start = _next_line_start(file, split_start - n_before, size)
      end = _next_line_start(file, split_end - n_before, size)
      if start < end:
        ranges.append(FileRange(file, start, end))
      n_before += size
    return ranges


def _next_line_start(file: pathlib.Path, position: int, size: int) -> int:
  """Returns the first position at or after `position` where a line of `file` starts.

  Positions outside of the file are clipped to its bounds. If no line starts within the next
  `_LONGEST_LINE` bytes, returns the position where the next UTF-8 character starts.
  """
  if not 0 < position < size:
    return min(max(position, 0), size)
  with file.open("rb") as stream:
    stream.seek(position - 1)
    context = stream.read(_LONGEST_LINE)  # from the byte before `position`
  if b"\n" in context:
    return position + context.index(b"\n")
  while position < size and context[1:2] and _continues_character(context[1]):
    position, context = position + 1, context[1:]
  return position


def _last_character_start(text: bytes) -> int:
  """Returns where the last UTF-8 character starts, or len(text) if there is only one character.

  The last character may be incomplete.
  """
  start = len(text) - 1
  while start > 0 and _continues_character(text[start]):
    start -= 1
  return start or len(text)


def _continues_character(byte: int) -> bool:
  """Returns whether a byte is a UTF-8 continuation byte."""
  return byte & 0xC0 == 0x80


def _read_ranges(ranges: list[FileRange]) -> Iterator[Chunk]:
  """Yields a document per range, in chunks that end after a line or, in long lines, a character."""
  for file, start, end in ranges:
    with file.open("rb") as stream:
      stream.seek(start)
      n_left, carry = end - start, b""
      while n_left:
        content = stream.read(min(n_left, _CHUNK))
        if not content:
          raise ValueError(f"{file} became shorter while it was read.")
        n_left -= len(content)
        content = carry + content
        chunk_len = content.rfind(b"\n") + 1 if n_left else len(content)
        chunk_len = chunk_len or _last_character_start(content)
        carry = content[chunk_len:]
        yield Chunk(content[:chunk_len], is_last=not n_left, file=file)
