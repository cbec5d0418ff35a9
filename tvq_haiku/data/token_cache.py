"""A cache of encoded splits: each is encoded once, and then read through a memory map.

  DIRECTORY/<source>-<split>-<key>/tokens.bin    unsigned integers: tokens minus `offset`
                                  /ends.npy      [n_document] int64: one past each document's end
                                  /facts.json    the fields of SplitStatistics
The key is a hash of the source's description and the vocabulary's fingerprint, so a split is
encoded again if its files or the vocabulary change.
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

_FORMAT = 1  # version of the files
_CHECKSUM_CHUNK = 1 << 24  # tokens
_TOKENS, _ENDS, _STATISTICS = "tokens.bin", "ends.npy", "facts.json"


@dataclasses.dataclass(frozen=True)
class SplitStatistics:
  """The statistics of an encoded split, and the format of its token file."""

  n_document: int  # non-empty documents
  n_byte: int  # bytes of the documents
  n_word: int  # maximal runs of bytes that are not ASCII white space
  n_token: int  # tokens, including the one that ends each document if the source has them
  unigram_entropy: float  # bits per token; models without context need at least as many
  checksum: int  # CRC-32 of the token file
  vocabulary: str  # fingerprint of the vocabulary
  dtype: str  # NumPy dtype of the token file
  offset: int  # token = value in the token file + offset


class Split(NamedTuple):
  """An encoded split."""

  stream: TokenStream  # memory-mapped
  statistics: SplitStatistics


def open_split(
  source: Source, split: str, vocabulary: Vocabulary, directory: str | os.PathLike | None = None
) -> Split:
  """Opens a split in the cache; if it is missing there, encodes it first.

  Its files are written atomically. If several processes need the same split, one encodes it and
  the others wait.

  Args:
    source: the dataset to read.
    split: "train", "validation" or "test".
    vocabulary: encodes the documents.
    directory: the directory of the cache; created if missing. None: `default_directory()`.

  Returns:
    The tokens of the split as a memory map, and its statistics.

  Raises:
    ValueError: the dataset is damaged, or the split is empty, or there is no default directory.
    OSError: the directory cannot be written, or the disk is full.
  """
  identity = [_FORMAT, source.describe(split), source.has_eos, vocabulary.fingerprint]
  key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
  directory = pathlib.Path(directory or default_directory()).absolute()
  path = directory / f"{source.name}-{split}-{key}"
  if not _is_complete(path):
    _prepare(directory)
    with files.lock(directory / f".{path.name}.lock"):
      if not _is_complete(path):  # no other process encoded it while this one waited
        _create(path, source, split, vocabulary)
  statistics = _read_statistics(path)
  values = np.memmap(path / _TOKENS, statistics.dtype, mode="r")
  return Split(TokenStream(values, np.load(path / _ENDS), statistics.offset), statistics)


def verify(split: Split) -> None:
  """Raises a ValueError if the tokens of a split changed on disk since they were encoded."""
  values, checksum = split.stream.values, 0
  for start in range(0, len(values), _CHECKSUM_CHUNK):
    chunk = np.ascontiguousarray(values[start : start + _CHECKSUM_CHUNK])
    checksum = zlib.crc32(chunk, checksum)
  if checksum != split.statistics.checksum:
    raise ValueError(
      f"{values.filename} is damaged: remove its directory to have the split encoded again."
    )


def default_directory() -> pathlib.Path:
  """Returns $XDG_CACHE_HOME/tvq_haiku, or ~/.cache/tvq_haiku if the variable is not set.

  Raises:
    ValueError: the user has no home directory.
  """
  if cache_home := os.environ.get("XDG_CACHE_HOME"):
    return pathlib.Path(cache_home) / "tvq_haiku"
  try:
    return pathlib.Path.home() / ".cache" / "tvq_haiku"
  except RuntimeError as error:
    raise ValueError(
      "there is no directory for encoded data, because this user has no home directory: set "
      "--cache_dir (or the environment variable XDG_CACHE_HOME)."
    ) from error


def _prepare(directory: pathlib.Path) -> None:
  """Creates the directory of the cache if it is missing, and checks that it is writable."""
  try:
    files.prepare_directory(directory)
  except OSError as error:
    raise OSError(f"{error} Choose a different --cache_dir.") from error


def _create(path: pathlib.Path, source: Source, split: str, vocabulary: Vocabulary) -> None:
  """Encodes a split into a draft directory, and renames it to `path` when it is complete."""
  draft = path.with_name(f".{path.name}.draft")
  # A draft was left by a process that died, because this process holds the lock.
  shutil.rmtree(draft, ignore_errors=True)
  try:
    draft.mkdir()
    _write_files(draft, source, split, vocabulary)
    for file in draft.iterdir():  # the contents must be on disk before the directory's name
      with file.open("rb") as handle:
        os.fsync(handle.fileno())
    shutil.rmtree(path, ignore_errors=True)  # if it exists, it is incomplete
    draft.rename(path)
  except OSError as error:
    raise OSError(
      f"cannot write the tokens of {source.name} to {path.parent}: "
      f"{error.strerror or error}. Free disk space, or choose a different --cache_dir."
    ) from error
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def _write_files(
  directory: pathlib.Path, source: Source, split: str, vocabulary: Vocabulary
) -> None:
  encoder = _SplitEncoder(vocabulary, has_eos=source.has_eos)
  with (
    (directory / _TOKENS).open("wb") as file,
    progress.bar(f"encoding {source.name} {split}", source.n_byte(split)) as show_progress,
  ):
    for chunk in _read(source, split):
      file.write(encoder.encode(chunk))
      show_progress(encoder.n_byte, f"{encoder.n_token:,} tokens")
  if not encoder.n_token:
    raise ValueError(f"the split {split!r} of {source.name} is empty: use more data.")
  encoder.end_document()
  np.save(directory / _ENDS, np.array(encoder.ends, np.int64))
  statistics = json.dumps(dataclasses.asdict(encoder.statistics()), indent=1)
  files.write_atomically(directory / _STATISTICS, statistics)


def _read(source: Source, split: str) -> Iterator[Chunk]:
  """Yields the chunks of a split.

  Raises:
    ValueError: the split cannot be read. (`_create` takes an OSError for a failed write.)
  """
  try:
    yield from source.read(split)
  except OSError as error:
    raise ValueError(f"the split {split!r} of {source.name} cannot be read: {error}") from error


class _SplitEncoder:
  """Encodes the chunks of a split one after the other, and updates its statistics."""

  def __init__(self, vocabulary: Vocabulary, *, has_eos: bool):
    self._vocabulary = vocabulary
    self._eos = [ByteVocabulary.EOS] if has_eos else []
    # Bytes without special tokens are stored as they are.
    without_special = vocabulary is ByteVocabulary and not has_eos
    self._offset = ByteVocabulary.OFFSET if without_special else 0
    self._dtype = np.dtype(
      "u1" if without_special else "<u2" if vocabulary.size <= 1 << 16 else "<u4"
    )
    self._token_counts = np.zeros(vocabulary.size, np.int64)
    self._checksum = 0
    self._in_document = False  # whether the current document has any bytes
    self.ends: list[int] = []  # one past the last token of each document
    self.n_byte = self.n_word = self.n_token = 0

  def encode(self, chunk: Chunk) -> bytes:
    """Encodes the next chunk, and returns its tokens as bytes of the token file."""
    try:
      if self._vocabulary is not ByteVocabulary:
        chunk.content.decode()  # otherwise, it would be encoded byte by byte
      tokens = self._vocabulary.encode(chunk.content)
    except UnicodeDecodeError as error:
      raise ValueError(f"{chunk.file} is not UTF-8: {error.reason}.") from error
    self.n_byte += len(chunk.content)
    self.n_word += len(chunk.content.split())
    self._in_document |= bool(chunk.content)
    ends_document = chunk.is_last and self._in_document  # empty documents are dropped
    if ends_document:
      tokens = np.append(tokens, np.array(self._eos, np.int32))
    self._token_counts += np.bincount(tokens, minlength=len(self._token_counts))
    self.n_token += len(tokens)
    if ends_document:
      self.end_document()
    content = (tokens - self._offset).astype(self._dtype).tobytes()
    self._checksum = zlib.crc32(content, self._checksum)
    return content

  def end_document(self) -> None:
    """Records the end of the current document, unless the document is empty."""
    if self._in_document:
      self.ends.append(self.n_token)
    self._in_document = False

  def statistics(self) -> SplitStatistics:
    """Returns the statistics of all chunks so far."""
    probabilities = self._token_counts[self._token_counts > 0] / self.n_token
    entropy = (probabilities * -np.log2(probabilities)).sum()
    return SplitStatistics(
      n_document=len(self.ends),
      n_byte=self.n_byte,
      n_word=self.n_word,
      n_token=self.n_token,
      unigram_entropy=float(entropy) + 0.0,  # turns -0 into 0
      checksum=self._checksum,
      vocabulary=self._vocabulary.fingerprint,
      dtype=self._dtype.str,
      offset=self._offset,
    )


def _read_statistics(path: pathlib.Path) -> SplitStatistics:
  return SplitStatistics(**json.loads((path / _STATISTICS).read_text(encoding="utf-8")))


def _is_complete(path: pathlib.Path) -> bool:
  """Returns whether all files of an encoded split exist and have the sizes in its statistics."""
  try:
    statistics = _read_statistics(path)
    ends = np.load(path / _ENDS, mmap_mode="r")
    size = (path / _TOKENS).stat().st_size
    return (
      size == statistics.n_token * np.dtype(statistics.dtype).itemsize
      and len(ends) == statistics.n_document
      and ends[-1] == statistics.n_token
    )
  except (OSError, ValueError, TypeError, EOFError, IndexError):
    return False
