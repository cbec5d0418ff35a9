"""The interface of a vocabulary, and the vocabulary of bytes."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Vocabulary(Protocol):
  """Maps bytes to tokens and back: token 0 is padding, 1 ends a document, 2 is unknown."""

  EOS: int  # 1, the token that ends a document
  size: int  # X
  fingerprint: str  # identifies the mapping in caches and runs

  def encode(self, text: str | bytes) -> np.ndarray:
    """Returns the tokens of `text`, [n] int32. Bytes need not be UTF-8."""

  def decode(self, tokens: npt.ArrayLike) -> bytes:
    """Returns the bytes of each of the `tokens`, concatenated; special tokens have none."""

  def check(self, caller: str, n_vocab: int) -> None:
    """Raises a ValueError, whose message begins with `caller`, unless `n_vocab` is `size`."""


class ByteVocabulary:
  """The vocabulary of bytes: byte b is token b + 3.

  Token 0 is padding, 1 ends a document, 2 is unknown.

  >>> ByteVocabulary.encode("Bath").tolist()
  [69, 100, 119, 107]
  >>> ByteVocabulary.decode([69, 100, 119, 107, 1])
  b'Bath'
  """

  PAD = 0
  EOS = 1
  UNK = 2
  SIZE = size = 259
  OFFSET = 3  # token of byte 0
  fingerprint = "bytes"

  @classmethod
  def check(cls, caller: str, n_vocab: int) -> None:
    """Raises a ValueError, whose message begins with `caller`, unless `n_vocab` is `size`."""
    if n_vocab != cls.SIZE:
      raise ValueError(
        f"{caller}: the model has n_vocab={n_vocab}, not the {cls.SIZE} tokens of the byte "
        "vocabulary: pass the vocabulary of the model, such as "
        "vocabulary=tvq_haiku.data.PieceVocabulary(FILE), or use a byte-level model."
      )

  @classmethod
  def encode(cls, text: str | bytes) -> np.ndarray:
    """Returns the tokens of the bytes of `text` (UTF-8 if it is a string), [n] int32."""
    raw = text.encode() if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.int32) + cls.OFFSET

  @classmethod
  def decode(cls, tokens: npt.ArrayLike) -> bytes:
    """Returns the bytes of `tokens`, an array of any shape; special tokens have none.

    Raises:
      ValueError: a token is not in the vocabulary.
    """
    tokens = np.asarray(tokens, np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < cls.SIZE:
      raise ValueError(
        f"byte tokens must lie in [0, {cls.SIZE}), got {tokens.min()}...{tokens.max()}."
      )
    return (tokens[tokens >= cls.OFFSET] - cls.OFFSET).astype(np.uint8).tobytes()


def encode_text(caller: str, name: str, vocabulary: Vocabulary, text: bytes) -> np.ndarray:
  """Returns the tokens of an argument, [n] int32.

  Args:
    caller: name of the function, for the message.
    name: name of the argument.
    vocabulary: the vocabulary.
    text: the argument.

  Raises:
    ValueError: the text is not UTF-8, and the vocabulary has no tokens of bytes.
  """
  try:
    return vocabulary.encode(text)
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{caller}: {name} is not UTF-8, and the vocabulary has no tokens of bytes: {error}."
    ) from None


def check_vocabulary(caller: str, vocabulary: Vocabulary, n_vocab: int) -> None:
  """Checks that an argument is the vocabulary of a model.

  Args:
    caller: name of the function, for the message.
    vocabulary: the argument that was passed.
    n_vocab: number of tokens of the model.

  Raises:
    TypeError: the argument is not a vocabulary.
    ValueError: the vocabulary has a different size.
  """
  if not all(hasattr(vocabulary, name) for name in ("encode", "decode", "check")):
    raise TypeError(
      f"{caller}: vocabulary={vocabulary!r} must be tvq_haiku.data.ByteVocabulary or a "
      "tvq_haiku.data.PieceVocabulary(FILE)."
    )
  vocabulary.check(caller, n_vocab)
