"""Splits as files of tokens: encoded once, then read through a memory map.

  DIRECTORY/<source>-<split>-<key>/tokens.bin    unsigned integers, see `offset` in facts.json
                                  /ends.npy      where each document ends
                                  /facts.json    what was counted on the way
The key stands for the source's files and the vocabulary: another one, another directory.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import NamedTuple
import zlib

import numpy as np

from tvq_haiku.data.sources.base import Chunk, Source
from tvq_haiku.data.stream import TokenStream
from tvq_haiku.data.vocabulary import ByteVocabulary, Vocabulary
from tvq_haiku.utils import files, progress

_FORMAT = 1
_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
  """What was counted while a split was encoded."""

  n_document: int
  n_byte: int
  n_word: int  # what stands between white space (of ASCII)
  n_token: int
  unigram_entropy: float  # bits per token: what a model without context needs at least
  checksum: int  # CRC-32 of the tokens
  vocabulary: str
  dtype: str
  offset: int  # token = number in the file + offset


class Split(NamedTuple):
  """A split, ready to be read."""

  stream: TokenStream
  statistics: SplitStatistics


def open_split(
  source: Source, split: str, vocabulary: Vocabulary, directory: str | os.PathLike
) -> Split:
  """The tokens of a split, from `directory` if they were encoded before.

  They appear there whole or not at all. Of several processes that want the same, one encodes and
  the others wait.

  Args:
    source: what to read.
    split: "train", "validation" or "test".
    vocabulary: how to encode it.
    directory: of such files; made if missing.

  Raises:
    ValueError: the source is damaged, or the split is empty.
    OSError: the directory cannot be written, or the disk is full.
  """
  about = [_FORMAT, source.describe(split), source.has_eos, vocabulary.fingerprint]
  key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
  directory = pathlib.Path(directory).absolute()
  place = directory / f"{source.name}-{split}-{key}"
  if not _is_whole(place):
    files.prepare_directory(directory)
    with files.lock(directory / f".{place.name}.lock"):
      if not _is_whole(place):  # while this process waited for the lock
        _encode(source, split, vocabulary, place)
  facts = _facts(place)
  values = np.memmap(place / "tokens.bin", facts.dtype, mode="r")
  return Split(TokenStream(values, np.load(place / "ends.npy"), facts.offset), facts)


def _encode(source: Source, split: str, vocabulary: Vocabulary, place: pathlib.Path) -> None:
  draft = place.with_name(f".{place.name}.draft")
  shutil.rmtree(draft, ignore_errors=True)  # of a process that died: this one holds the lock
  try:
    draft.mkdir()
    _write(source, split, vocabulary, draft)
    for file in draft.iterdir():  # on disk before the name that says so
      with file.open("rb") as handle:
        os.fsync(handle.fileno())
    shutil.rmtree(place, ignore_errors=True)  # not whole, or it would have been used
    draft.rename(place)
  except OSError as error:
    raise OSError(
      f"cannot write the tokens of {source.name} to {place.parent}: "
      f"{error.strerror or error}. Make room, or name another --cache_dir."
    ) from error
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def _write(source: Source, split: str, vocabulary: Vocabulary, draft: pathlib.Path) -> None:
  raw_bytes = vocabulary is ByteVocabulary and not source.has_eos
  offset = ByteVocabulary.OFFSET if raw_bytes else 0
  dtype = np.dtype("u1" if raw_bytes else "<u2" if vocabulary.size <= 1 << 16 else "<u4")
  eos = np.array([ByteVocabulary.EOS], np.int32)
  n_token = n_byte = n_word = checksum = 0
  begun = False  # a document
  ends, uses = [], np.zeros(vocabulary.size, np.int64)
  total = source.n_byte(split)
  with (
    (draft / "tokens.bin").open("wb") as file,
    progress.bar(f"encoding {source.name} {split}", total) as shown,
  ):
    for piece in _readable(source, split):
      try:
        tokens = vocabulary.encode(piece.content)
      except UnicodeDecodeError as error:
        raise ValueError(f"{piece.file} is not UTF-8: {error.reason}.") from error
      n_byte += len(piece.content)
      n_word += len(piece.content.split())
      begun |= bool(piece.content)
      closes = piece.ends and begun  # an empty document is none
      if closes and source.has_eos:
        tokens = np.concatenate([tokens, eos])
      content = (tokens - offset).astype(dtype).tobytes()
      file.write(content)
      checksum = zlib.crc32(content, checksum)
      uses += np.bincount(tokens, minlength=vocabulary.size)
      n_token += len(tokens)
      if closes:
        ends.append(n_token)
        begun = False
      shown(n_byte, f"{n_token:,} tokens")
  if not n_token:
    raise ValueError(f"the split {split!r} of {source.name} is empty: there is too little data.")
  if begun:
    ends.append(n_token)
  np.save(draft / "ends.npy", np.array(ends, np.int64))
  shares = uses[uses > 0] / n_token
  entropy = float((shares * -np.log2(shares)).sum()) + 0.0  # 0, not -0
  facts = SplitStatistics(
    len(ends), n_byte, n_word, n_token, entropy, checksum, vocabulary.fingerprint, dtype.str, offset
  )
  files.write_atomically(draft / "facts.json", json.dumps(dataclasses.asdict(facts), indent=1))


def _readable(source: Source, split: str) -> Iterator[Chunk]:
  """What is read; that it cannot be read must not pass for a full disk."""
  try:
    yield from source.read(split)
  except OSError as error:
    raise ValueError(f"the split {split!r} of {source.name} cannot be read: {error}") from error


def verify(split: Split) -> None:
  """Raises a ValueError unless the tokens are those that were encoded, bit for bit."""
  values, checksum = split.stream.values, 0
  for start in range(0, len(values), _CHUNK):
    checksum = zlib.crc32(np.ascontiguousarray(values[start : start + _CHUNK]), checksum)
  if checksum != split.statistics.checksum:
    raise ValueError(
      f"{values.filename} is damaged: remove its directory, and it will be made again."
    )


def _facts(place: pathlib.Path) -> SplitStatistics:
  return SplitStatistics(**json.loads((place / "facts.json").read_text()))


def _is_whole(place: pathlib.Path) -> bool:
  """Whether the files are there and as long as they must be."""
  try:
    facts = _facts(place)
    ends = np.load(place / "ends.npy", mmap_mode="r")
    size = (place / "tokens.bin").stat().st_size
    return (
      size == facts.n_token * np.dtype(facts.dtype).itemsize
      and len(ends) == facts.n_document
      and ends[-1] == facts.n_token
    )
  except (OSError, ValueError, TypeError, EOFError, IndexError):
    return False


def default_directory() -> pathlib.Path:
  """Where the user's programs keep what they can make again."""
  return (
    pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "tvq_haiku"
  )
