"""Streams: inputs, targets and documents of tokens."""

import numpy as np
import pytest

from tvq_haiku import data

from data_helpers import all_tokens, random_stream


def test_inputs_are_the_targets_shifted_by_one_token():
  batch = all_tokens(random_stream())
  assert batch["inputs"][0] == 1 and (batch["inputs"][1:] == batch["targets"][:-1]).all()
  assert (np.flatnonzero(batch["targets"] == 1) == [40, 48, 109]).all()
  assert (np.bincount(batch["doc_ids"]) == [41, 8, 61]).all()


def test_the_first_input_of_a_document_without_eos_is_eos():
  values = np.arange(12, dtype=np.uint8)
  stream = data.TokenStream(values, np.array([4, 8, 12]), offset=3)
  batch = all_tokens(stream)
  assert batch["inputs"].tolist() == [1, 3, 4, 5, 1, 7, 8, 9, 1, 11, 12, 13]
  assert (batch["targets"] == values + 3).all() and batch["targets"].dtype == np.int32
  assert batch["doc_ids"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
  selected = stream.take(np.array([[5, 6], [8, 0]]))
  assert selected["inputs"].tolist() == [[7, 8], [1, 1]]


@pytest.mark.parametrize("documents", [[], [np.array([], np.int32)], [np.array([3]), np.array([])]])
def test_empty_documents_are_refused(documents):
  with pytest.raises(ValueError, match="no document may be empty"):
    data.stream_of(documents)


@pytest.mark.parametrize(
  "documents, message",
  [
    ("text", r"a list of arrays of tokens, got one str: pass \[tokens\]"),
    (np.arange(3), "got one ndarray"),
    (["text"], r"documents\[0\] must be an array of tokens, got str. A text is encoded by"),
    ([np.array([3]), b"text"], r"documents\[1\] must be an array of tokens, got bytes"),
    ([3, 4], r"documents\[0\] must be an array of tokens, got int"),
    ([np.array([3.5])], r"documents\[0\] must be integer, got float"),
  ],
)
def test_documents_that_are_not_lists_of_tokens_are_refused(documents, message):
  with pytest.raises(TypeError, match=f"stream_of: .*{message}"):
    data.stream_of(documents)


def test_arrays_of_a_wrong_rank_are_named():
  with pytest.raises(ValueError, match=r"stream_of: documents\[1\] must have shape \[n\]"):
    data.stream_of([np.array([3]), np.array([[3, 4]])])
  with pytest.raises(ValueError, match=r"TokenStream: values must have shape \[n\]"):
    data.TokenStream(np.zeros((2, 3), np.int32), np.array([6]))
  with pytest.raises(ValueError, match=r"TokenStream: ends must have shape \[d\]"):
    data.TokenStream(np.zeros(6, np.int32), np.array(6))


@pytest.mark.parametrize("n, ends", [(3, [3]), (4, [4]), (9, [4, 8, 9]), (12, [4, 8, 12])])
def test_the_head_of_a_stream(n, ends):
  head = data.TokenStream(np.arange(12), np.array([4, 8, 12]), offset=2).head(n)
  assert len(head) == n and head.ends.tolist() == ends and head.offset == 2
  assert all_tokens(head)["targets"].tolist() == list(range(2, 2 + n))
