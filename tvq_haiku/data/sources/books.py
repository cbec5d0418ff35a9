"""Books in the layout of PG-19: {train,validation,test}/ID.txt and metadata.csv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import csv
import os
import pathlib

import numpy as np

from tvq_haiku.data.sources import base
from tvq_haiku.data.sources.base import JSON, Chunk
from tvq_haiku.utils import progress

_EXPECTED = (
  "Expected: the directories train (28,602 books), validation (50) and test (100), one .txt "
  "per book, 11.7 GB in total, and metadata.csv. DeepMind publishes them as PG-19."
)


class Books:
  """A dataset of books in UTF-8, read in the order of file names; each book is a document."""

  name = "pg19"
  has_eos = True

  def __init__(self, data_dir: str | os.PathLike):
    """Lists the books, and logs a warning if metadata.csv lists books that are missing.

    Args:
      data_dir: a directory with the subdirectories train, validation and test.

    Raises:
      ValueError: a split is missing or empty, or a book is a broken link.
      OSError: a directory cannot be read.
    """
    self._path = base.existing_path(data_dir, _EXPECTED)
    absent = [split for split in base.SPLITS if not (self._path / split).is_dir()]
    if absent:
      raise ValueError(f"--data_dir={data_dir} has no {' or '.join(absent)}. {_EXPECTED}")
    self._files = {split: base.find_files(self._path / split, "*.txt") for split in base.SPLITS}
    for split, files in self._files.items():
      if not files:
        raise ValueError(
          f"the split {split!r} is empty: {self._path / split} contains no .txt. {_EXPECTED}"
        )
    if missing := self.missing():
      progress.log(
        f"warning: {self._path / 'metadata.csv'} lists {len(missing)} books that are missing from "
        f"the splits, such as {missing[0]}.txt."
      )

  def describe(self, split: str) -> list[JSON]:
    """Returns JSON that changes whenever the books of the split change."""
    return [self.name, *base.fingerprint(self._files[split])]

  def n_byte(self, split: str) -> int:
    """Returns the number of bytes in the split."""
    return sum(file.stat().st_size for file in self._files[split])

  def read(self, split: str) -> Iterator[Chunk]:
    """Yields each book of the split as one chunk.

    Raises:
      ValueError: a book is not UTF-8.
      OSError: a book cannot be read.
    """
    return _read_books(self._files[split])

  def missing(self) -> list[str]:
    """Returns the book IDs that metadata.csv lists but no split contains.

    Without metadata.csv, no book is missing.
    """
    metadata = self._path / "metadata.csv"
    if not metadata.is_file():
      return []
    present = {file.stem for files in self._files.values() for file in files}
    with metadata.open(newline="", encoding="utf-8", errors="replace") as file:
      listed = [fields[0] for fields in csv.reader(file) if fields]
    return [book for book in listed if book.isdigit() and book not in present]

  def sample(self, n_byte: int, *, seed: int) -> Iterator[str]:
    """Yields non-empty lines from books of the training split in random order.

    Args:
      n_byte: maximum number of bytes to read, including line breaks.
      seed: determines the order of the books.
    """
    books = self._files["train"]
    order = np.random.default_rng(seed).permutation(len(books))
    return base.lines(_read_books([books[i] for i in order]), n_byte)


def _read_books(books: Sequence[pathlib.Path]) -> Iterator[Chunk]:
  for file in books:
    content = file.read_bytes()
    try:
      content.decode()
    except UnicodeDecodeError as error:
      raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}.") from error
    yield Chunk(content, is_last=True, file=file)
