"""Bytes of text: enwik8 as it is published, and any files of the user's."""

from __future__ import annotations

import bz2
from collections.abc import Iterator
import gzip
import lzma
import os
import pathlib
from typing import Any, BinaryIO
import zipfile
import zlib

import numpy as np

from tvq_haiku.data.sources import base
from tvq_haiku.data.sources.base import Chunk

_CHUNK = 1 << 24
_LONGEST_LINE = 1 << 16
_DAMAGE = (EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def _bounds(n: int) -> dict[str, tuple[int, int]]:
  """Where the 90 %, 5 % and 5 % of n bytes lie.

  >>> _bounds(100)
  {'train': (0, 90), 'validation': (90, 95), 'test': (95, 100)}
  """
  cuts = (0, n * 90 // 100, n * 95 // 100, n)
  return {split: (start, end) for split, start, end in zip(base.SPLITS, cuts, cuts[1:])}


def _line_start(file: pathlib.Path, place: int, size: int) -> int:
  """Where the next line begins at or after `place`, if soon; else the next character."""
  if not 0 < place < size:
    return min(max(place, 0), size)
  with file.open("rb") as stream:
    stream.seek(place - 1)
    after = stream.read(_LONGEST_LINE)
  if b"\n" in after:
    return place + after.index(b"\n")
  while place < size and after[1:2] and after[1] & 0xC0 == 0x80:  # inside of a UTF-8 character
    place, after = place + 1, after[1:]
  return place


def _last_character(text: bytes) -> int:
  """Where the last UTF-8 character begins, so that none is cut there."""
  place = len(text) - 1
  while place > 0 and text[place] & 0xC0 == 0x80:
    place -= 1
  return place or len(text)


class Enwik8:
  """The first 100,000,000 bytes of a Wikipedia dump, raw or packed; or another one-file dump.

  The first 90 % are for training, then 5 % for validation, then 5 % for the test. Every byte is a
  token, and there are no others: each split is a piece of one long document.
  """

  name = "enwik8"
  has_eos = False

  def __init__(self, data_dir: str | os.PathLike, *, n_byte: int = 100_000_000):
    """Finds the file.

    Args:
      data_dir: the file, or a directory that holds enwik8 or enwik8.zip, .gz, .bz2 or .xz.
      n_byte: what its size must be, unpacked.
    """
    self._expected = (
      f"Expected: the file enwik8, {n_byte:,} bytes, or enwik8.zip, or enwik8.gz. It is published "
      "with the Large Text Compression Benchmark and the Hutter Prize."
    )
    path = base.directory(data_dir, self._expected)
    if path.is_dir():
      names = [path / f"enwik8{ending}" for ending in ("", ".zip", *_OPENERS)]
      found = [file for file in names if file.is_file()]
      if not found:
        raise ValueError(f"--data_dir={data_dir} holds no enwik8. {self._expected}")
      path = found[0]
    self._file = path
    self._size = n_byte

  def describe(self, split: str) -> Any:
    return [self.name, split, self._size, *base.fingerprint([self._file])]

  def n_byte(self, split: str) -> int:
    start, end = _bounds(self._size)[split]
    return end - start

  def read(self, split: str) -> Iterator[Chunk]:
    start, end = _bounds(self._size)[split]
    try:
      with self._open() as stream:
        whole = stream.read(self._size + 1)
    except _DAMAGE as error:
      if isinstance(error, OSError) and error.filename:
        raise  # it cannot be opened
      raise ValueError(f"{self._file} is truncated or damaged: {error}") from error
    if len(whole) != self._size:
      there = f"{len(whole):,}" if len(whole) < self._size else f"more than {self._size:,}"
      raise ValueError(
        f"{self._file} has {there} bytes, not {self._size:,}: it is truncated, or "
        f"another file. {self._expected}"
      )
    if start == end:
      raise ValueError(f"{self._file}: {self._size} bytes leave none for the split {split!r}.")
    for first in range(start, end, _CHUNK):
      last = min(first + _CHUNK, end)
      yield Chunk(whole[first:last], ends=last == end, file=self._file)

  def _open(self) -> BinaryIO:
    if self._file.suffix != ".zip":
      return _OPENERS.get(self._file.suffix, open)(self._file, "rb")
    archive = zipfile.ZipFile(self._file)
    if "enwik8" not in archive.namelist():
      raise ValueError(
        f"{self._file} holds no member enwik8; it has {archive.namelist()[:5]}. {self._expected}"
      )
    return archive.open("enwik8")


class TextFiles:
  """A text file, or all files of a directory in the order of their names.

  Each file is a document. 90 % of the bytes are for training, then come 5 % for validation and 5 %
  for the test; a file that is cut by these bounds, at the next line, is a document in both. If the
  directory has subdirectories train, validation and test, they are the splits instead. Names that
  begin with a dot are left out.
  """

  name = "text"
  has_eos = True

  def __init__(self, data_dir: str | os.PathLike):
    expected = "Expected: a text file, or a directory of text files."
    self._path = base.directory(data_dir, expected)
    self._ready_split = all((self._path / split).is_dir() for split in base.SPLITS)
    everything = sorted(self._path.rglob("*")) if self._path.is_dir() else [self._path]
    self._files = [
      file
      for file in everything
      if file.is_file()
      and not any(part.startswith(".") for part in file.relative_to(self._path).parts)
    ]
    if not sum(file.stat().st_size for file in self._files):
      raise ValueError(f"--data_dir={data_dir} holds no text. {expected}")

  def _parts(self, split: str) -> list[tuple[pathlib.Path, int, int]]:
    """The files of a split, and from which byte to which."""
    if self._ready_split:
      inside = [f for f in self._files if (self._path / split) in f.parents]
      return [(f, 0, f.stat().st_size) for f in inside]
    sizes = [file.stat().st_size for file in self._files]
    start, end = _bounds(sum(sizes))[split]
    parts, before = [], 0
    for file, size in zip(self._files, sizes):
      part = [_line_start(file, bound - before, size) for bound in (start, end)]
      if part[0] < part[1]:
        parts.append((file, *part))
      before += size
    return parts

  def describe(self, split: str) -> Any:
    parts = self._parts(split)
    return [self.name, [part[1:] for part in parts], base.fingerprint([part[0] for part in parts])]

  def n_byte(self, split: str) -> int:
    return sum(end - start for _, start, end in self._parts(split))

  def read(self, split: str) -> Iterator[Chunk]:
    return self._read(self._parts(split))

  def sample(self, n_byte: int, *, seed: int) -> Iterator[str]:
    """Lines of the training split, from files in random order, until they are `n_byte` long."""
    parts = self._parts("train")
    order = np.random.default_rng(seed).permutation(len(parts))
    return base.lines(self._read([parts[i] for i in order]), n_byte)

  def _read(self, parts: list[tuple[pathlib.Path, int, int]]) -> Iterator[Chunk]:
    for file, start, end in parts:
      with file.open("rb") as stream:
        stream.seek(start)
        left, kept = end - start, b""
        while left:
          chunk = stream.read(min(left, _CHUNK))
          if not chunk:
            raise ValueError(f"{file} became shorter while it was read.")
          left -= len(chunk)
          chunk = kept + chunk
          cut = chunk.rfind(b"\n") + 1 if left else len(chunk)
          cut = cut or _last_character(chunk)
          kept = chunk[cut:]
          yield Chunk(chunk[:cut], ends=not left, file=file)
