"""What a token stands for: bytes."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Vocabulary(Protocol):
  """Between bytes and tokens: 0 is padding, 1 ends a document, 2 is unknown."""

  size: int  # X
  fingerprint: str  # another one, other tokens

  def encode(self, text: str | bytes) -> np.ndarray:
    """[n] int32 tokens."""

  def decode(self, tokens) -> bytes:
    """The bytes of `tokens`; special tokens have none."""

  def check(self, caller: str, n_vocab: int) -> None:
    """Raises a ValueError unless a model of `n_vocab` tokens has this vocabulary."""


class ByteVocabulary:
  """0 is padding, 1 ends a document, 2 is unknown, and byte b is token b + 3.

  >>> ByteVocabulary.encode("Bath").tolist()
  [69, 100, 119, 107]
  >>> ByteVocabulary.decode([69, 100, 119, 107, 1])
  b'Bath'
  """

  PAD = 0
  EOS = 1
  UNK = 2
  SIZE = size = 259
  OFFSET = 3  # of bytes
  fingerprint = "bytes"

  @classmethod
  def check(cls, caller: str, n_vocab: int) -> None:
    """Raises a ValueError unless a model of `n_vocab` tokens has this vocabulary."""
    if n_vocab != cls.SIZE:
      raise ValueError(
        f"{caller}: the model has n_vocab={n_vocab}, not the {cls.SIZE} of the byte vocabulary."
      )

  @classmethod
  def encode(cls, text: str | bytes) -> np.ndarray:
    """[n] int32 tokens of the UTF-8 bytes of `text`."""
    raw = text.encode() if isinstance(text, str) else text
    return np.frombuffer(raw, np.uint8).astype(np.int32) + cls.OFFSET

  @classmethod
  def decode(cls, tokens) -> bytes:
    """The bytes of `tokens`; special tokens have none.

    Raises:
      ValueError: a token is not of this vocabulary.
    """
    tokens = np.asarray(tokens, np.int64).reshape(-1)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < cls.SIZE:
      raise ValueError(
        f"byte tokens must lie in [0, {cls.SIZE}), got {tokens.min()}...{tokens.max()}."
      )
    return (tokens[tokens >= cls.OFFSET] - cls.OFFSET).astype(np.uint8).tobytes()
