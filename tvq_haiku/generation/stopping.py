"""Conditions that end a text: an eos token, and stop sequences of several tokens.

Letters: B batch, X vocabulary, n number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp

from tvq_haiku.types import Array


class StopConditions(NamedTuple):
  """Conditions that end a text: a static argument under jit, so each new value recompiles."""

  eos_id: int | None = None  # token in [0, X) that ends a text; None: there is no such token
  sequences: tuple[tuple[int, ...], ...] = ()  # stop sequences of at least one token each

  @property
  def max_len(self) -> int:
    """Number of most recent tokens that `ends_text` needs."""
    return max([1, *map(len, self.sequences)])


def make_stop_conditions(eos_id: int | None, sequences: Iterable[Iterable[int]]) -> StopConditions:
  """Converts an eos and stop sequences (lists or arrays of tokens) to hashable stop conditions."""
  return StopConditions(
    eos_id=None if eos_id is None else int(eos_id),
    sequences=tuple(tuple(int(token) for token in sequence) for sequence in sequences),
  )


def ends_text(recent_tokens: Array, stop: StopConditions) -> Array:
  """Returns, for each text, whether its last sampled token ends it.

  Args:
    recent_tokens: [B, n] int32: the last n >= stop.max_len sampled tokens; -1 where fewer than n
      tokens have been sampled.
    stop: the conditions.

  Returns:
    [B] bool.

  >>> recent_tokens = jnp.array([[5, 1], [1, 5]])
  >>> ends_text(recent_tokens, StopConditions(eos_id=1)).tolist()
  [True, False]
  >>> ends_text(recent_tokens, StopConditions(sequences=((5,), (5, 1)))).tolist()
  [True, True]
  """
  chex.assert_rank(recent_tokens, 2)
  chex.assert_axis_dimension_gteq(recent_tokens, 1, stop.max_len)
  is_end = jnp.zeros(recent_tokens.shape[:1], bool)
  if stop.eos_id is not None:
    is_end |= recent_tokens[:, -1] == stop.eos_id
  for sequence in stop.sequences:
    is_end |= jnp.all(recent_tokens[:, -len(sequence) :] == jnp.array(sequence), axis=1)
  return is_end


def strip_stop_sequence(tokens: list[int], sequences: Sequence[Sequence[int]]) -> list[int]:
  """Removes the longest stop sequence that `tokens` ends with, if there is one.

  >>> strip_stop_sequence([5, 1, 2], [[2], [1, 2], [7]])
  [5]
  """
  matches = [len(s) for s in sequences if tokens[-len(s) :] == list(s)]
  return tokens[: len(tokens) - max(matches, default=0)]


def partial_match_len(tokens: list[int], sequences: Sequence[Sequence[int]]) -> int:
  """Returns the length of the longest suffix of `tokens` that is a proper prefix of a sequence.

  >>> partial_match_len([5, 1, 2], [[1, 2, 3], [2, 9]])
  2
  """
  lengths = (n for s in sequences for n in range(1, len(s)) if tokens[-n:] == list(s[:n]))
  return max(lengths, default=0)
