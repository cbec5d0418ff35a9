"""Conditions that end a text: sequences of one or more tokens, or of bytes.

Letters: B batch, n number of recent tokens, S number of sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from tvq_haiku.data.vocabulary import Vocabulary
from tvq_haiku.ops.padding import round_up_to_power_of_two
from tvq_haiku.types import Array
from tvq_haiku.utils import value_checks

# Most conditions fit into this array, and so share a compiled program.
_MIN_SEQUENCES = 4
_MIN_TOKENS = 8
_ANY = -2  # matches every token
_NEVER = -3  # matches no token


class StopConditions(NamedTuple):
  """Token sequences that end a text, as an array, so that other sequences do not recompile."""

  # [S, n] int32: each row is a sequence, padded on the left with `_ANY`; unused rows are `_NEVER`.
  sequences: Array

  @property
  def max_len(self) -> int:
    """Number of most recent tokens that `ends_text` needs."""
    return self.sequences.shape[1]


def make_stop_conditions(sequences: Iterable[Sequence[int]] = ()) -> StopConditions:
  """Converts sequences of at least one token each to stop conditions.

  Args:
    sequences: a text ends with any of them. A token that ends a text is a sequence of one token.

  >>> make_stop_conditions([[1], [13, 13]]).sequences.shape
  (4, 8)
  """
  rows = [list(sequence) for sequence in sequences]
  n = round_up_to_power_of_two(max([_MIN_TOKENS, *map(len, rows)]))
  array = np.full((round_up_to_power_of_two(max(_MIN_SEQUENCES, len(rows))), n), _NEVER, np.int32)
  for row, sequence in zip(array, rows, strict=False):  # the other rows of the array are padding
    row[:] = _ANY
    row[n - len(sequence) :] = sequence
  return StopConditions(array)


def ends_text(recent_tokens: Array, stop: StopConditions) -> Array:
  """Returns, for each text, whether its last sampled token ends it.

  Args:
    recent_tokens: [B, n] int32: the last n = stop.max_len sampled tokens; -1 where fewer than n
      tokens have been sampled.
    stop: the conditions.

  Returns:
    [B] bool.

  >>> recent_tokens = jnp.array([[-1] * 6 + [5, 1], [-1] * 6 + [1, 5]])
  >>> ends_text(recent_tokens, make_stop_conditions([[1]])).tolist()
  [True, False]
  >>> ends_text(recent_tokens, make_stop_conditions([[5], [5, 1]])).tolist()
  [True, True]
  """
  chex.assert_shape(recent_tokens, (None, stop.max_len))
  matches = (stop.sequences == _ANY) | (recent_tokens[:, None] == stop.sequences)  # [B, S, n]
  return jnp.any(jnp.all(matches, axis=2), axis=1)


def check_eos_ids(caller: str, eos_id: Any, n_vocab: int) -> list[int]:
  """Returns the argument `eos_id` as a list of tokens.

  Args:
    caller: name of the function, for the message.
    eos_id: None, a token, or several tokens.
    n_vocab: X; tokens must lie in [0, X).

  Raises:
    ValueError: the argument is anything else.

  >>> check_eos_ids("f", [1, 13], n_vocab=20)
  [1, 13]
  """
  if eos_id is None:
    return []
  tokens = _integers(eos_id if _is_list(eos_id) else [eos_id], n_vocab)
  if tokens is None:
    raise ValueError(
      f"{caller}: eos_id={eos_id!r} must be None, a token in [0, {n_vocab}), or a list of tokens."
    )
  return tokens


def check_stop_sequences(caller: str, stop: Any, n_vocab: int) -> list[list[int]]:
  """Returns the argument `stop` of a function of tokens as lists of tokens.

  Args:
    caller: name of the function, for the message.
    stop: the argument that was passed.
    n_vocab: X; tokens must lie in [0, X).

  Raises:
    ValueError: the argument does not hold sequences of at least one token.

  >>> check_stop_sequences("f", [1, 13], n_vocab=20)
  Traceback (most recent call last):
  ValueError: f: stop=[1, 13] must be a list of sequences of one or more tokens in [0, 20), such ...
  """
  sequences = [_integers(s, n_vocab) for s in stop] if _is_list(stop) else [None]
  if not all(sequences):  # a sequence is None or empty
    raise ValueError(
      f"{caller}: stop={stop!r} must be a list of sequences of one or more tokens in "
      f"[0, {n_vocab}), such as [[13], [5, 6]]. eos_id takes single tokens, such as [1, 13]; "
      "continue_text and LanguageModel take texts."
    )
  return sequences


def check_stop_texts(caller: str, stop: Any) -> list[bytes]:
  """Returns the argument `stop` of a function of texts as bytes.

  Args:
    caller: name of the function, for the message.
    stop: the argument that was passed.

  Raises:
    ValueError: the argument is one text, or it has an empty text.
    TypeError: an element is not a text.
  """
  texts = value_checks.check_texts(caller, "stop", stop)
  if not all(texts):
    raise ValueError(f"{caller}: stop={stop!r}: a stop text must not be empty.")
  return texts


def _is_list(value: Any) -> bool:
  """Returns whether a value has elements, and is not a text."""
  is_text = isinstance(value, (str, bytes, bytearray))
  return isinstance(value, Iterable) and not is_text and getattr(value, "ndim", 1) > 0


def _integers(values: Any, limit: int) -> list[int] | None:
  """Returns a list of integers in [0, limit); None if `values` is anything else."""
  if not _is_list(values):
    return None
  try:
    return [
      value_checks.check_integer("", "", value, minimum=0, maximum=limit - 1) for value in values
    ]
  except ValueError:
    return None


def encode_stop_texts(vocabulary: Vocabulary, stop_texts: Sequence[bytes]) -> list[np.ndarray]:
  """Returns the tokens of each stop text, without the texts that decoding would not restore.

  As stop sequences, these tokens end most texts early. But a model of subwords may write a stop
  text with other tokens, too, so the bytes of the sampled tokens must also be searched for it.
  """
  sequences = []
  for text in stop_texts:
    try:
      tokens = vocabulary.encode(text)
    except UnicodeDecodeError:  # not UTF-8, and the vocabulary has no tokens of bytes
      continue
    if vocabulary.decode(tokens) == text:
      sequences.append(tokens)
  return sequences


def find_stop_text(text: bytes, stop_texts: Sequence[bytes], start: int = 0) -> tuple[int, int]:
  """Finds the stop text that is complete first, and of several such texts the longest.

  Args:
    text: the text to search.
    stop_texts: texts of at least one byte.
    start: a stop text does not begin before this position.

  Returns:
    The positions in `text` where it begins and ends; both are `len(text)` if none is found.

  >>> find_stop_text(b"to be or not", [b"not", b"be", b"to be"])
  (0, 5)
  >>> find_stop_text(b"to be", [b"not"])
  (5, 5)
  """
  found = [
    (begin + len(stop), begin) for stop in stop_texts if (begin := text.find(stop, start)) >= 0
  ]
  end, begin = min(found, default=(len(text), len(text)))
  return begin, end


def partial_match_len(text: bytes, stop_texts: Sequence[bytes]) -> int:
  """Returns the length of the longest suffix of `text` that is a proper prefix of a stop text.

  >>> partial_match_len(b"to be", [b"bet", b"ex"])
  2
  """
  lengths = (n for stop in stop_texts for n in range(1, len(stop)) if text.endswith(stop[:n]))
  return max(lengths, default=0)
