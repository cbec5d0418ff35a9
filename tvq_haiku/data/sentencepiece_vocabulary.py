"""Pieces of words as tokens: a SentencePiece vocabulary (BPE) that gives back exactly what it got."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import io
import os
import pathlib
from typing import Any
import zlib

from absl import logging
import numpy as np

from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.utils import files, optional

_SPACE = "▁"  # how SentencePiece writes a space; a text that has this character needs care
_PROBE = "  It was;\n\nwas it?\té▁🧀 "
_LONGEST_LINE = 1 << 16  # bytes of a line that training looks at


class PieceVocabulary:
  """A .model file: 0 is padding, 1 ends a document, 2 is unknown; there is no begin token.

  What it encodes it decodes, byte for byte, if it was trained by `train_pieces`: spaces are kept,
  nothing is normalised, and characters that it does not know fall apart into bytes.
  """

  EOS = ByteVocabulary.EOS

  def __init__(self, file: str | os.PathLike):
    """Reads `file`.

    Raises:
      ValueError, OSError: it cannot be read, or numbers its special tokens differently.
    """
    model = pathlib.Path(file).read_bytes()
    spm = _sentencepiece()
    try:
      self._processor = spm.SentencePieceProcessor(model_proto=model)
      special = tuple(
        getattr(self._processor, f"{name}_id")() for name in ("pad", "eos", "unk", "bos")
      )
    except RuntimeError as error:
      raise ValueError(f"{file} is not a SentencePiece model.") from error
    if special != (ByteVocabulary.PAD, ByteVocabulary.EOS, ByteVocabulary.UNK, -1):
      raise ValueError(
        f"{file} numbers pad, eos, unk and bos {special}, not (0, 1, 2, -1): "
        "train it with --command=train_vocab."
      )
    self.file = pathlib.Path(file)
    self.size = self._processor.get_piece_size()
    self.fingerprint = f"pieces-{self.size}-{zlib.crc32(model):08x}"
    space = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
    self._space = None if ByteVocabulary.UNK in space else space
    if self.decode(self.encode(_PROBE)) != _PROBE.encode():
      logging.warning(
        "%s loses text (such as line breaks, repeated spaces, or rare characters): a model "
        "need not predict what is lost, so its figures are too good.",
        file,
      )

  def check(self, caller: str, n_vocab: int) -> None:
    """Raises a ValueError unless a model of `n_vocab` tokens has this vocabulary."""
    if n_vocab != self.size:
      raise ValueError(
        f"{caller}: the model has n_vocab={n_vocab}, not the {self.size} of {self.file}: "
        "one of them must change."
      )

  def encode(self, text: str | bytes) -> np.ndarray:
    """[n] int32 tokens; bytes must be UTF-8."""
    text = text if isinstance(text, str) else text.decode()
    if self._space is None or _SPACE not in text:
      return np.array(self._processor.encode(text), np.int32)
    tokens = []
    for i, part in enumerate(text.split(_SPACE)):
      tokens += (self._space if i else []) + self._processor.encode(part)
    return np.array(tokens, np.int32)

  def decode(self, tokens) -> bytes:
    """UTF-8 of `tokens`; padding and ends of documents have none.

    Raises:
      ValueError: a token is not of this vocabulary.
    """
    tokens = np.asarray(tokens, np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.size:
      raise ValueError(f"tokens must lie in [0, {self.size}), got {tokens.min()}...{tokens.max()}.")
    return self._processor.decode(tokens[tokens >= 2].tolist()).encode()


def train_pieces(lines: Iterable[str], file: str | os.PathLike, *, size: int) -> PieceVocabulary:
  """Learns a vocabulary of `size` pieces from lines of text, and writes it to `file`.

  Args:
    lines: without their line breaks, each of which is a piece of its own.
    file: the .model to write, whole or not at all.
    size: of the vocabulary, special tokens and 256 bytes included.

  Raises:
    ValueError: the text is too little, or too much alike, for so many pieces.
  """
  model = io.BytesIO()
  failure: list[Exception] = []

  def kept() -> Iterator[str]:
    """SentencePiece makes text of an exception in here."""
    try:
      yield from lines
    except Exception as error:
      failure.append(error)
      raise

  try:
    _sentencepiece().SentencePieceTrainer.train(
      sentence_iterator=kept(),
      model_writer=model,
      model_type="bpe",
      vocab_size=size,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      user_defined_symbols=["\n"],
      # Exactly what went in comes out:
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      byte_fallback=True,
      max_sentence_length=_LONGEST_LINE,
      minloglevel=2,
    )
  except RuntimeError as error:
    if failure:
      raise failure[0] from None
    reason = " ".join(str(error).split()).rsplit(") ", 1)[-1]
    raise ValueError(
      f"no vocabulary of {size} pieces can be learned from this text: {reason}"
    ) from error
  file = pathlib.Path(file)
  files.prepare_directory(file.parent)
  files.write_atomically(file, model.getvalue())
  return PieceVocabulary(file)


def _sentencepiece() -> Any:
  return optional.require("sentencepiece", extra="train", purpose="vocabularies of pieces")
