"""Documents end to end, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.types import HostBatch


@dataclasses.dataclass(frozen=True)
class TokenStream:
  """Tokens in memory or in a file; what is read of it is what is asked for.

  Every token is predicted from the one before it in its document, the first from an eos.
  """

  values: np.ndarray  # [n]: tokens less `offset`; may be a memory map
  ends: np.ndarray  # [number of documents] int64, ascending: the index behind each one's last token
  offset: int = 0

  def __len__(self) -> int:
    return len(self.values)

  def head(self, n: int) -> TokenStream:
    """The first n tokens."""
    ends = self.ends[: np.searchsorted(self.ends, n, side="right")]
    cut = n < len(self) and (not len(ends) or ends[-1] < n)
    return TokenStream(self.values[:n], np.append(ends, n) if cut else ends, self.offset)

  def take(self, index: np.ndarray) -> HostBatch:
    """`inputs`, `targets` and `doc_ids`, int32, of the tokens at `index`, of any shape.

    >>> batch = stream_of([np.array([5, 6]), np.array([7])]).take(np.arange(5))
    >>> batch["inputs"].tolist(), batch["targets"].tolist(), batch["doc_ids"].tolist()
    ([1, 5, 6, 1, 7], [5, 6, 1, 7, 1], [0, 0, 0, 1, 1])
    """
    index = np.asarray(index)
    doc_ids = np.searchsorted(self.ends, index, side="right").astype(np.int32)
    starts = np.where(doc_ids == 0, 0, self.ends[np.maximum(doc_ids - 1, 0)])
    before = self._tokens(np.maximum(index - 1, 0))
    return {
      "inputs": np.where(index == starts, np.int32(ByteVocabulary.EOS), before),
      "targets": self._tokens(index),
      "doc_ids": doc_ids,
    }

  def _tokens(self, index: np.ndarray) -> np.ndarray:
    return self.values[index].astype(np.int32) + np.int32(self.offset)


def stream_of(documents: Sequence[np.ndarray], *, eos: int = ByteVocabulary.EOS) -> TokenStream:
  """Joins documents (arrays of tokens), each closed by an eos.

  >>> len(stream_of([np.array([5, 6]), np.array([7])]))
  5
  """
  if not documents or any(len(document) == 0 for document in documents):
    raise ValueError("a stream needs at least one document, and no document may be empty.")
  values = np.concatenate([np.append(document, eos) for document in documents]).astype(np.int32)
  return TokenStream(values, np.cumsum([len(document) + 1 for document in documents]))
