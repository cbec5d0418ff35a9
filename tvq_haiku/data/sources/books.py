"""Books laid out like PG-19: {train,validation,test}/ID.txt, and metadata.csv."""

from __future__ import annotations

from collections.abc import Iterator
import csv
import os
import pathlib
from typing import Any

from absl import logging
import numpy as np

from tvq_haiku.data.sources import base
from tvq_haiku.data.sources.base import Chunk

_EXPECTED = (
  "Expected: the directories train (28,602 books), validation (50) and test (100), one .txt "
  "a book, 11.7 GB in all, and metadata.csv. DeepMind publishes them as PG-19."
)


class Books:
  """Each book is a document, in the order of the file names; it must be UTF-8."""

  name = "pg19"
  has_eos = True

  def __init__(self, data_dir: str | os.PathLike):
    path = base.directory(data_dir, _EXPECTED)
    missing = [split for split in base.SPLITS if not (path / split).is_dir()]
    if missing:
      raise ValueError(f"--data_dir={data_dir} has no {' or '.join(missing)}. {_EXPECTED}")
    self._path = path
    self._files = {split: sorted((path / split).glob("*.txt")) for split in base.SPLITS}
    for split, files in self._files.items():
      if not files:
        raise ValueError(f"{path / split} holds no .txt: the split {split!r} is empty. {_EXPECTED}")
    if missing := self.missing():
      logging.warning(
        "%s lists %d books that are not there, such as %s.txt.",
        path / "metadata.csv",
        len(missing),
        missing[0],
      )

  def describe(self, split: str) -> Any:
    return [self.name, *base.fingerprint(self._files[split])]

  def n_byte(self, split: str) -> int:
    return sum(file.stat().st_size for file in self._files[split])

  def read(self, split: str) -> Iterator[Chunk]:
    return _read(self._files[split])

  def missing(self) -> list[str]:
    """IDs that metadata.csv lists and no directory has; none if there is no such file."""
    metadata = self._path / "metadata.csv"
    if not metadata.is_file():
      return []
    there = {file.stem for files in self._files.values() for file in files}
    with metadata.open(newline="", encoding="utf-8", errors="replace") as rows:
      listed = [row[0] for row in csv.reader(rows) if row]
    return [book for book in listed if book.isdigit() and book not in there]

  def sample(self, n_byte: int, *, seed: int) -> Iterator[str]:
    """Lines of randomly chosen books for training, until they are `n_byte` long."""
    books = self._files["train"]
    order = np.random.default_rng(seed).permutation(len(books))
    return base.lines(_read([books[i] for i in order]), n_byte)


def _read(books: list[pathlib.Path]) -> Iterator[Chunk]:
  for file in books:
    content = file.read_bytes()
    try:
      content.decode()
    except UnicodeDecodeError as error:
      raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start}.") from error
    yield Chunk(content, ends=True, file=file)
