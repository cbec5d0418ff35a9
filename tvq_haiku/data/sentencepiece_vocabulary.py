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

_SPACE = "▁"  # SentencePiece's symbol for a space
# Two things are encoded as bytes: this symbol, if it occurs in a text; and bytes that are not
# UTF-8, which Python's error handler "surrogateescape" decodes to these surrogates.
_ENCODED_AS_BYTES = re.compile(f"([{_SPACE}\udc80-\udcff]+)")
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
  encodes unknown characters as their UTF-8 bytes, and bytes that are not UTF-8 as they are.
  """

  EOS = ByteVocabulary.EOS

  def __init__(self, file: str | os.PathLike):
    """Reads `file`, and logs a warning if the vocabulary is not lossless.

    Raises:
      ValueError: `file` is not a SentencePiece model, or has different special tokens.
      OSError: `file` cannot be read.
    """
    self.file = pathlib.Path(file)
    self.model = self.file.read_bytes()  # the content of the file
    spm = _sentencepiece()
    try:
      self._processor = spm.SentencePieceProcessor(model_proto=self.model)
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
    self.size = self._processor.get_piece_size()
    self.fingerprint = f"pieces-{self.size}-{zlib.crc32(self.model):08x}"
    self._bytes_of_tokens = [self._bytes_of_token(token) for token in range(self.size)]
    byte_tokens = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    self._byte_tokens = None if ByteVocabulary.UNK in byte_tokens else byte_tokens
    if self.decode(self.encode(_PROBE)) != _PROBE.encode():
      progress.log(
        f"warning: {file} loses text (such as line breaks, repeated spaces, or rare characters): a "
        "model need not predict the lost text, so its metrics are too good."
      )

  def _bytes_of_token(self, token: int) -> bytes:
    """Returns the bytes of a token; padding and the end of a document have none."""
    processor = self._processor
    if processor.is_control(token):
      return b""
    if processor.is_unknown(token):
      return processor.decode([token]).encode()
    piece = processor.id_to_piece(token)
    if processor.is_byte(token):
      return bytes.fromhex(piece[len("<0x") : -len(">")])
    return piece.replace(_SPACE, " ").encode()

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
      UnicodeDecodeError: `text` is bytes, but not UTF-8, and the vocabulary has no tokens of bytes.
    """
    if self._byte_tokens is None:
      text = text if isinstance(text, str) else text.decode()
      return np.array(self._processor.encode(text), np.int32)
    text = text if isinstance(text, str) else text.decode(errors="surrogateescape")
    tokens: list[int] = []
    for i, part in enumerate(_ENCODED_AS_BYTES.split(text)):  # odd parts are matches
      if i % 2:
        raw = part.encode(errors="surrogateescape")
        tokens += [self._byte_tokens[byte] for byte in raw]
      else:
        tokens += self._processor.encode(part)
    return np.array(tokens, np.int32)

  def decode(self, tokens: npt.ArrayLike) -> bytes:
    """Returns the bytes of each of the `tokens`, concatenated.

    So tokens can be decoded in parts whose bytes are concatenated, even if a part ends inside of a
    character.

    Args:
      tokens: array of any shape. Padding and ends of documents have no bytes.

    Raises:
      ValueError: a token is not in the vocabulary.
    """
    tokens = np.asarray(tokens, np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.size:
      raise ValueError(f"tokens must lie in [0, {self.size}), got {tokens.min()}...{tokens.max()}.")
    return b"".join(self._bytes_of_tokens[token] for token in tokens.tolist())


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
  """Iterates over lines, split into parts that SentencePiece does not ignore.

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

  A word keeps the space before it, so that SentencePiece finds the same words as in the complete
  line.

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
