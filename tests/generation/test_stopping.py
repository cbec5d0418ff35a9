"""Tests of stop conditions."""

import jax.numpy as jnp
import pytest

from tvq_haiku.generation import stopping


@pytest.mark.parametrize(
  "recent_tokens, eos_id, sequences, expected",
  [
    ([7, 1], 1, (), True),
    ([1, 7], 1, (), False),
    ([-1, 5], None, ((4, 5),), False),  # the prompt does not count
    ([4, 5], None, ((4, 5),), True),
    ([5, 4], None, ((4, 5),), False),
    ([4, 5], None, ((6, 7), (5,)), True),
    ([4, 5], 1, (), False),
    ([4, 5], None, (), False),
  ],
)
def test_a_text_ends_with_an_eos_or_a_stop_sequence(recent_tokens, eos_id, sequences, expected):
  stop = stopping.StopConditions(eos_id, sequences)
  ends = stopping.ends_text(jnp.array([recent_tokens, [0, 0]]), stop)
  assert ends.tolist() == [expected, False]


def test_a_stop_sequence_needs_enough_recent_tokens():
  stop = stopping.StopConditions(None, ((4, 5, 6),))
  assert stop.max_len == 3
  with pytest.raises(AssertionError):
    stopping.ends_text(jnp.zeros((1, 2), jnp.int32), stop)


def test_the_longest_stop_sequence_is_removed_from_the_end_only():
  strip = stopping.strip_stop_sequence
  assert strip([3, 1, 2], [[2], [1, 2], [1, 2, 3]]) == [3]
  assert strip([1, 2, 3], [[2], [1, 2]]) == [1, 2, 3]
  assert strip([], [[2]]) == []
  assert strip([1, 2], []) == [1, 2]


def test_the_beginning_of_a_stop_sequence_is_found_at_the_end():
  assert stopping.partial_match_len([1, 2, 3], [[3, 4], [2, 3, 9]]) == 2
  assert stopping.partial_match_len([1, 2, 3], [[3, 4]]) == 1
  assert stopping.partial_match_len([1, 2, 3], [[1, 2]]) == 0
  assert stopping.partial_match_len([1, 2, 3], []) == 0
