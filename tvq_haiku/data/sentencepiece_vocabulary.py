"""Subword vocabularies (SentencePiece BPE) whose decoding restores the text byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import io
import os
import pathlib
import re
import types
import zlib

import numpy as np
import numpy.typing as npt

from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.utils import files, optional, progress

_SPACE = "▁"  # SentencePiece's symbol for a space; in a text, it is encoded as bytes
_PROBE = "  It was;\n\nwas it?\té▁🧀 "  # a text that only lossless vocabularies restore
_SPECIAL_IDS = (ByteVocabulary.PAD, ByteVocabulary.EOS, ByteVocabulary.UNK, -1)  # -1: no such token
_TRAINER_SETTINGS = dict(
  model_type="bpe",
  pad_id=ByteVocabulary.PAD,
  eos_id=ByteVocabulary.EOS,
  unk_id=ByteVocabulary.UNK,
  bos_id=-1,
  user_defined_symbols=["\n"],
  # The next five make the vocabulary lossless.
  normalization_rule_name="identity",
  remove_extra_whitespaces=False,
  add_dummy_prefix=False,
  byte_fallback=True,
  required_chars=_SPACE,  # a text without spaces would have no token for them
  max_sentence_length=1 << 16,  # bytes; longer sentences would be ignored
  minloglevel=2,  # errors only
)
_SENTENCE_LEN = 1 << 14  # characters, of at most 4 bytes; longer lines are split
_UP_TO_SPACE = re.compile(r".*(?=\s)", re.DOTALL)  # the text before the last white space
_RESERVED = "▅"  # SentencePiece ignores a sentence that contains this character


class PieceVocabulary:
  """A subword vocabulary in a SentencePiece .model file.

  Token 0 is padding, 1 ends a document, 2 is unknown; there is no begin token. A vocabulary that
  was trained by `train_pieces` is lossless: it keeps spaces, does not normalize the text, and
  encodes unknown characters as their UTF-8 bytes.
  """

  EOS = ByteVocabulary.EOS

  def __init__(self, file: str | os.PathLike):
    """Reads `file`, and logs a warning if the vocabulary is not lossless.

    Raises:
      ValueError: `file` is not a SentencePiece model, or has different special tokens.
      OSError: `file` cannot be read.
    """
    model = pathlib.Path(file).read_bytes()
    spm = _sentencepiece()
    try:
      self._processor = spm.SentencePieceProcessor(model_proto=model)
      special_ids = tuple(
        getattr(self._processor, f"{name}_id")() for name in ("pad", "eos", "unk", "bos")
      )
    except RuntimeError as error:
      raise ValueError(f"{file} is not a SentencePiece model.") from error
    if special_ids != _SPECIAL_IDS:
      raise ValueError(
        f"{file}: the ids of pad, eos, unk and bos are {special_ids}, but must be {_SPECIAL_IDS}: "
        "train the vocabulary with --command=train_vocab."
      )
    self.file = pathlib.Path(file)
    self.size = self._processor.get_piece_size()
    self.fingerprint = f"pieces-{self.size}-{zlib.crc32(model):08x}"
    space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    self._space_tokens = None if ByteVocabulary.UNK in space else space
    if self.decode(self.encode(_PROBE)) != _PROBE.encode():
      progress.log(
        f"warning: {file} loses text (such as line breaks, repeated spaces, or rare characters): a "
        "model need not predict the lost text, so its metrics are too good."
      )

  def check(self, caller: str, n_vocab: int) -> None:
    """Raises a ValueError, whose message begins with `caller`, unless `n_vocab` is `size`."""
    if n_vocab != self.size:
      raise ValueError(
        f"{caller}: the model has n_vocab={n_vocab}, not the {self.size} of {self.file}: "
        f"set n_vocab={self.size}, or use a different vocabulary."
      )

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the tokens of `text`, [n] int32.

    Raises:
      UnicodeDecodeError: `text` is bytes, but not UTF-8.
    """
    text = text if isinstance(text, str) else text.decode()
    if self._space_tokens is None or _SPACE not in text:
      return np.array(self._processor.encode(text), np.int32)
    first, *others = text.split(_SPACE)
    tokens = self._processor.encode(first)
    for segment in others:
      tokens += self._space_tokens + self._processor.encode(segment)
    return np.array(tokens, np.int32)

  def decode(self, tokens: npt.ArrayLike) -> bytes:
    """Returns the UTF-8 text of `tokens`, an array of any shape.

    Padding and ends of documents have no text.

    Raises:
      ValueError: a token is not in the vocabulary.
    """
    tokens = np.asarray(tokens, np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.size:
      raise ValueError(f"tokens must lie in [0, {self.size}), got {tokens.min()}...{tokens.max()}.")
    return self._processor.decode(tokens[tokens >= ByteVocabulary.UNK].tolist()).encode()


def train_pieces(
  lines: Iterable[str | bytes], file: str | os.PathLike, *, size: int
) -> PieceVocabulary:
  """Trains a vocabulary on lines of text and writes it to `file`.

  Args:
    lines: text or UTF-8 bytes without line breaks (a line break is always a token of its own);
      lines of any length are used completely.
    file: the .model file to write, atomically; missing directories are created.
    size: number of tokens, including the special tokens and 256 bytes.

  Returns:
    The vocabulary, read from `file`.

  Raises:
    ValueError: there is no text, or the text has too few different words, or too many different
      characters, for `size` tokens.
    TypeError: `lines` does not hold texts.
    OSError: the file cannot be written.
    Exception: whatever `lines` raises.
  """
  if isinstance(lines, (str, bytes)):
    raise TypeError("train_pieces: lines must be an iterable of texts, not one text.")
  sentences = _Sentences(lines)
  model = io.BytesIO()
  try:
    _sentencepiece().SentencePieceTrainer.train(
      sentence_iterator=iter(sentences),
      model_writer=model,
      vocab_size=size,
      **_TRAINER_SETTINGS,
    )
  except (RuntimeError, ValueError) as error:
    if sentences.error is not None:
      raise sentences.error from None
    if not sentences.count:
      raise ValueError(
        f"cannot train a vocabulary of {size} tokens: the text is empty, or has only empty lines."
      ) from error
    message = " ".join(str(error).split())
    reason = message.rpartition("] ")[2]  # without the C++ condition that failed
    raise ValueError(
      f"cannot train a vocabulary of {size} tokens on this text: change the number of tokens or "
      f"the text. SentencePiece reports: {reason}"
    ) from error
  file = pathlib.Path(file)
  files.prepare_directory(file.parent)
  files.write_atomically(file, model.getvalue())
  return PieceVocabulary(file)


class _Sentences:
  """Iterates over lines, in parts of which SentencePiece ignores none.

  Attributes:
    count: number of parts so far.
    error: the exception that ended the iteration; SentencePiece keeps only its message.
  """

  def __init__(self, lines: Iterable[str | bytes]):
    self._lines = lines
    self.count = 0
    self.error: Exception | None = None

  def __iter__(self) -> Iterator[str]:
    try:
      for line in self._lines:
        if not isinstance(line, (str, bytes)):
          raise TypeError(f"train_pieces: lines must hold texts, got {type(line).__name__}.")
        text = line if isinstance(line, str) else line.decode()
        for part in filter(None, text.split(_RESERVED)):
          for sentence in _split_long_line(part):
            self.count += 1
            yield sentence
    except Exception as error:
      self.error = error
      raise


def _split_long_line(line: str, max_len: int = _SENTENCE_LEN) -> Iterator[str]:
  """Splits a line into parts of at most `max_len` characters, before white space if there is any.

  A word keeps the space before it, so a part has the same words as in the whole line.

  >>> list(_split_long_line("so it was", 6))
  ['so it', ' was']
  >>> list(_split_long_line("whatsoever", 6))
  ['whatso', 'ever']
  """
  start = 0
  while len(line) - start > max_len:
    match = _UP_TO_SPACE.match(line, start + 1, start + max_len + 1)
    end = start + max_len if match is None else match.end()
    yield line[start:end]
    start = end
  yield line[start:]


def _sentencepiece() -> types.ModuleType:
  return optional.require("sentencepiece", extra="train", purpose="SentencePiece vocabularies")
