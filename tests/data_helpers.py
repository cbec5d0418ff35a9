"""Helpers for the tests of datasets, streams and packing."""

import numpy as np

from tvq_haiku import data


def read_documents(source, split):
  """Returns the documents of a split, after checking that `n_byte` is their total size."""
  documents, document = [], b""
  for chunk in source.read(split):
    document += chunk.content
    if chunk.is_last:
      documents.append(document)
      document = b""
  assert not document, "the last document has no last chunk"
  assert source.n_byte(split) == sum(map(len, documents))
  return documents


def random_stream(lengths=(40, 7, 60), seed=0):
  """Returns a stream of random byte documents, each followed by an eos token."""
  rng = np.random.default_rng(seed)
  return data.stream_of([rng.integers(3, 259, n) for n in lengths])


def all_tokens(stream):
  """Returns `inputs`, `targets` and `doc_ids` of all tokens of a stream."""
  return stream.take(np.arange(len(stream)))
