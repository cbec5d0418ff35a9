"""Decodes tokens to chunks of text while they are sampled."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np

from tvq_haiku.data.vocabulary import Vocabulary
from tvq_haiku.generation import stopping


class TextStream:
  r"""Decodes a stream of tokens to chunks of text that later tokens cannot change.

  It holds back bytes that may be the beginning of a stop text, and those of an incomplete
  character.

  >>> from tvq_haiku.data.vocabulary import ByteVocabulary
  >>> stream = TextStream(ByteVocabulary, [b"END"])
  >>> [stream.read(ByteVocabulary.encode(part)) for part in (b"K\xc3", b"\xa4se E", b"NDE")]
  [2, 5, 2]
  >>> stream.take(), stream.is_stopped
  ('Käse ', True)
  """

  def __init__(self, vocabulary: Vocabulary, stop_texts: Sequence[bytes], *, pending: bytes = b""):
    """Starts with no tokens.

    Args:
      vocabulary: vocabulary of the tokens.
      stop_texts: texts at which the text ends. `pending` is not searched for them.
      pending: the bytes of an incomplete character, which the first tokens continue.
    """
    self._vocabulary = vocabulary
    self.stop_texts = stop_texts
    self._utf8_decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._ready = self._utf8_decoder.decode(pending)  # text that `take` returns
    self._held_back = b""  # bytes that may be the beginning of a stop text
    self.is_stopped = False  # whether a stop text has been found; then no more tokens are read

  @property
  def pending(self) -> bytes:
    """The bytes of an incomplete character, and those that may begin a stop text."""
    return self._utf8_decoder.getstate()[0] + self._held_back

  def read(self, tokens: Sequence[int] | np.ndarray) -> int:
    """Reads the next tokens, up to the one that completes a stop text.

    Args:
      tokens: [n] tokens.

    Returns:
      The number of tokens that were read: n, unless an earlier token completes a stop text.
    """
    parts = [self._vocabulary.decode([token]) for token in tokens]
    raw = self._held_back + b"".join(parts)
    begin, end = stopping.find_stop_text(raw, self.stop_texts)
    self.is_stopped = begin < end
    n_held_back = 0 if self.is_stopped else stopping.partial_match_len(raw, self.stop_texts)
    ends = len(self._held_back) + np.cumsum([len(part) for part in parts])
    self._held_back = raw[begin - n_held_back : begin]
    self._ready += self._utf8_decoder.decode(raw[: begin - n_held_back])
    return int(np.searchsorted(ends, end)) + 1 if self.is_stopped else len(parts)

  def release(self, *, is_end: bool) -> None:
    """Makes `take` return bytes that were held back as the possible beginning of a stop text.

    Args:
      is_end: whether the text has ended; then an incomplete character becomes a replacement
        character, otherwise its bytes stay pending.
    """
    self._ready += self._utf8_decoder.decode(self._held_back, final=is_end)
    self._held_back = b""

  def take(self) -> str:
    """Returns the text that is ready and was not yet taken; it may be empty."""
    text, self._ready = self._ready, ""
    return text
