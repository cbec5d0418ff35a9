"""The interface of a dataset on disk: splits that yield documents as chunks of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import os
import pathlib
import re
from typing import NamedTuple, Protocol

SPLITS = ("train", "validation", "test")
_LONGEST_NAME = 60  # characters that `data_name` returns

JSON = bool | int | float | str | list["JSON"] | dict[str, "JSON"] | None


class Chunk(NamedTuple):
  """A contiguous part of a document that fits into memory."""

  content: bytes
  is_last: bool  # whether the document ends with this chunk
  file: pathlib.Path  # the file that the chunk was read from


class FileRange(NamedTuple):
  """The part of a file that belongs to a split."""

  file: pathlib.Path
  start: int  # first byte or image, depending on the source
  end: int  # one past the last


class Source(Protocol):
  """A dataset on disk; the errors that its methods raise name the file and the problem."""

  name: str
  has_eos: bool  # whether an end-of-document token follows every document

  def describe(self, split: str) -> list[JSON]:
    """Returns JSON that changes whenever the split's files, or the way they are read, change."""

  def n_byte(self, split: str) -> int:
    """Returns the number of bytes in the split, without reading its documents."""

  def read(self, split: str) -> Iterator[Chunk]:
    """Yields the documents of the split in order, each as one or more chunks."""


class SampledSource(Source, Protocol):
  """A dataset of text on which a vocabulary can be trained."""

  def sample(self, n_byte: int, *, seed: int) -> Iterator[str]:
    """Yields non-empty lines of the training split in random order, at most `n_byte` bytes."""


def lines(chunks: Iterator[Chunk], n_byte: int) -> Iterator[str]:
  r"""Yields the non-empty lines of the first `n_byte` bytes of `chunks`, without line breaks.

  >>> list(lines(iter([Chunk(b"Anne\n\nElliot", True, "a")]), 8))
  ['Anne', 'El']
  """
  for chunk in chunks:
    content = chunk.content[:n_byte]
    n_byte -= len(content)
    yield from filter(None, content.decode(errors="ignore").split("\n"))
    if n_byte <= 0:
      return


def existing_path(data_dir: str | os.PathLike | None, expected: str) -> pathlib.Path:
  """Returns `data_dir` as a path.

  Args:
    data_dir: a file or a directory.
    expected: a description of the dataset's files, for the error message.

  Raises:
    ValueError: `data_dir` is None or does not exist.
  """
  if data_dir is None:
    raise ValueError(f"--data_dir is missing. {expected}")
  path = pathlib.Path(data_dir)
  if not path.exists():
    raise ValueError(f"--data_dir={data_dir} does not exist. {expected}")
  return path


def find_files(directory: pathlib.Path, pattern: str) -> list[pathlib.Path]:
  """Returns the files in a directory whose names match a pattern, in the order of their names.

  Args:
    directory: the directory; its subdirectories are not searched. If it is a file or is missing,
      the result is empty.
    pattern: a file name with wildcards, such as "*.txt".

  Raises:
    ValueError: such a file is a broken link.
    OSError: the directory cannot be read.
  """
  paths = directory.iterdir() if directory.is_dir() else ()
  found = sorted(path for path in paths if path.match(pattern))
  for path in found:
    _check_link(path)
  return found


def files_below(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns all files below a directory in the order of their paths; links are followed.

  Files and directories whose names begin with a dot are left out.

  Raises:
    ValueError: a link is broken, or leads to a directory that contains it.
    OSError: a directory cannot be read.
  """
  return sorted(_walk(directory, ()))


def _walk(directory: pathlib.Path, outer: tuple[pathlib.Path, ...]) -> Iterator[pathlib.Path]:
  """Yields the files below a directory; `outer` are the real paths of the directories above it."""
  real = directory.resolve()
  if any(real == path or real in path.parents for path in outer):
    raise ValueError(f"{directory} is a link to {real}, which contains it: remove the link.")
  for path in directory.iterdir():
    if path.name.startswith("."):
      continue
    _check_link(path)
    if path.is_dir():
      yield from _walk(path, (*outer, real))
    elif path.is_file():
      yield path


def _check_link(path: pathlib.Path) -> None:
  """Raises a ValueError if `path` is a broken link."""
  if path.is_symlink() and not path.exists():
    raise ValueError(
      f"{path} is a broken link (to {path.readlink()}): restore its target, or remove the link."
    )


def data_name(data_dir: str | os.PathLike) -> str:
  """Returns the name of a directory, or of a file without its suffix, for use in file names.

  >>> data_name("novels/Pride & Prejudice.txt"), data_name("/")
  ('Pride-Prejudice', 'data')
  """
  path = pathlib.Path(os.path.abspath(data_dir))
  name = path.name if path.is_dir() else path.stem
  name = re.sub(r"[^\w.]+", "-", name).strip("-.")
  return name[:_LONGEST_NAME].rstrip("-.") or "data"


def fingerprint(files: Sequence[pathlib.Path]) -> list[JSON]:
  """Returns [name, size in bytes, modification time in ns] of each file."""
  return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def describe_ranges(ranges: Sequence[FileRange]) -> list[JSON]:
  """Returns the bounds of all ranges, then the fingerprints of their files."""
  return [[[r.start, r.end] for r in ranges], fingerprint([r.file for r in ranges])]
