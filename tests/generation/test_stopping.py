"""Tests of stop conditions: of tokens while they are sampled, and of bytes afterwards."""

import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku import data
from tvq_haiku.generation import stopping


def ends_text(recent_tokens, sequences):
  """Returns whether the last of the recent tokens, 8 after filling up with -1, ends a text."""
  stop = stopping.make_stop_conditions(sequences)
  filled = [-1] * (stop.max_len - len(recent_tokens)) + recent_tokens
  ends = stopping.ends_text(jnp.array([filled, [0] * stop.max_len]), stop).tolist()
  assert ends[1] is False
  return ends[0]


@pytest.mark.parametrize(
  "recent_tokens, sequences, expected",
  [
    ([7, 1], [[1]], True),
    ([1, 7], [[1]], False),
    ([7, 13], [[1], [13]], True),
    ([-1, 5], [[4, 5]], False),  # the prompt does not count
    ([4, 5], [[4, 5]], True),
    ([5, 4], [[4, 5]], False),
    ([4, 5], [[6, 7], [5]], True),
    ([4, 5], [], False),
    (list(range(9)), [list(range(9))], True),  # longer than the smallest array
    ([9], [[i] for i in range(5, 12)], True),  # more than fit into the smallest array
    ([3], [[i] for i in range(5, 12)], False),
  ],
)
def test_a_text_ends_with_any_of_several_sequences(recent_tokens, sequences, expected):
  assert ends_text(recent_tokens, sequences) == expected


def test_common_conditions_have_the_same_shape():
  conditions = ([], [[1]], [[1], [13, 13]], [[1, 2, 3, 4, 5, 6, 7, 8], [2], [3], [4]])
  shapes = {stopping.make_stop_conditions(c).sequences.shape for c in conditions}
  assert shapes == {(4, 8)}
  assert stopping.make_stop_conditions([[5] * 9] * 5).sequences.shape == (8, 16)


@pytest.mark.parametrize(
  "eos_id, expected", [(None, []), (1, [1]), (np.int64(1), [1]), ([1, 13], [1, 13]), ((), [])]
)
def test_eos_ids_are_one_token_or_several(eos_id, expected):
  assert stopping.check_eos_ids("f", eos_id, 20) == expected
  if eos_id is not None:
    assert stopping.check_eos_ids("f", np.array(eos_id, np.int32), 20) == expected


@pytest.mark.parametrize("eos_id", [20, -1, 1.5, "a", b"a", [1, 20], [[1]], [[1], [1, 2]]])
def test_wrong_eos_ids_are_named(eos_id):
  with pytest.raises(
    ValueError, match=r"f: eos_id=.* must be None, a token in \[0, 20\), or a list"
  ):
    stopping.check_eos_ids("f", eos_id, 20)


def test_stop_sequences_are_lists_or_arrays():
  expected = [[13, 13], [5]]
  assert stopping.check_stop_sequences("f", expected, 20) == expected
  assert stopping.check_stop_sequences("f", [np.array([13, 13]), (5,)], 20) == expected
  assert stopping.check_stop_sequences("f", np.array([[1, 2], [3, 4]]), 20) == [[1, 2], [3, 4]]
  assert stopping.check_stop_sequences("f", [], 20) == []


@pytest.mark.parametrize("stop", [[1, 13], [b"\n"], ["a"], "a", b"a", None, 13, [[3], []], [[20]]])
def test_wrong_stop_sequences_are_named(stop):
  with pytest.raises(ValueError, match=r"f: stop=.* must be a list of sequences of one or more"):
    stopping.check_stop_sequences("f", stop, 20)


def test_stop_texts_are_not_empty_and_a_list():
  assert stopping.check_stop_texts("f", ["é", b"\xff"]) == [b"\xc3\xa9", b"\xff"]
  with pytest.raises(ValueError, match=r"f: stop=\['a', ''\]: a stop text must not be empty"):
    stopping.check_stop_texts("f", ["a", ""])
  with pytest.raises(ValueError, match="f: stop must be a list of texts, got one str: pass"):
    stopping.check_stop_texts("f", "end")
  with pytest.raises(TypeError, match=r"f: stop\[1\] must be a str or bytes, got 13"):
    stopping.check_stop_texts("f", ["a", 13])


def test_only_texts_that_the_vocabulary_restores_are_stop_sequences(pieces):
  texts = [b"it was", "▁".encode(), b"\xff"]
  tokens = stopping.encode_stop_texts(pieces, texts)
  assert [pieces.decode(t) for t in tokens] == texts

  class Lossy(data.ByteVocabulary):
    @classmethod
    def encode(cls, text):
      return data.ByteVocabulary.encode(text.lower())

  assert [t.tolist() for t in stopping.encode_stop_texts(Lossy, [b"A", b"a"])] == [[100]]


def test_the_stop_text_that_is_complete_first_is_found():
  find = stopping.find_stop_text
  assert find(b"to be or not", [b"or not", b"be"]) == (3, 5)
  assert find(b"to be or not", [b"e o", b"to be o"]) == (
    0,
    7,
  )  # the longest of those that end first
  assert find(b"to be", [b"to", b"be"], start=1) == (3, 5)
  assert find(b"to be", []) == find(b"to be", [b"bee"]) == (5, 5)
  assert find(b"", [b"a"]) == (0, 0)


def test_the_beginning_of_a_stop_text_is_found_at_the_end():
  assert stopping.partial_match_len(b"abc", [b"cd", b"bcx"]) == 2
  assert stopping.partial_match_len(b"abc", [b"cd"]) == 1
  assert stopping.partial_match_len(b"abc", [b"ab"]) == 0
  assert stopping.partial_match_len(b"abc", []) == 0
