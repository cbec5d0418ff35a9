"""What a data set is to those who read it: splits of documents, as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import os
import pathlib
from typing import Any, NamedTuple, Protocol

SPLITS = ("train", "validation", "test")


class Chunk(NamedTuple):
  """Some of a document."""

  content: bytes
  ends: bool  # the document
  file: pathlib.Path  # it comes from


class Source(Protocol):
  """A data set on disk. What its methods raise names the file and says what is wrong with it."""

  name: str
  has_eos: bool  # whether every document is closed by an eos

  def describe(self, split: str) -> Any:
    """JSON that changes when the files or how they are read do."""

  def n_byte(self, split: str) -> int:
    """About how much there is to read."""

  def read(self, split: str) -> Iterator[Chunk]:
    """All of a split, in order, in pieces that fit into memory."""


def lines(pieces: Iterator[Chunk], n_byte: int) -> Iterator[str]:
  r"""The lines of `pieces` that are not empty, without their breaks, until they are `n_byte` long.

  >>> list(lines(iter([Piece(b"Anne\n\nElliot", True, "a")]), 8))
  ['Anne', 'El']
  """
  for piece in pieces:
    content = piece.content[:n_byte]
    n_byte -= len(content)
    yield from filter(None, content.decode(errors="ignore").split("\n"))
    if n_byte <= 0:
      return


def directory(data_dir: str | os.PathLike | None, expected: str) -> pathlib.Path:
  """`data_dir`, which must be given and exist.

  Args:
    data_dir: to look at.
    expected: what should be there, for the message.
  """
  if data_dir is None:
    raise ValueError(f"--data_dir is missing. {expected}")
  path = pathlib.Path(data_dir)
  if not path.exists():
    raise ValueError(f"--data_dir={data_dir} does not exist. {expected}")
  return path


def fingerprint(files: Sequence[pathlib.Path]) -> list[list[Any]]:
  """Name, size and time of change of each file."""
  return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
