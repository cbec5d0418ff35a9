"""A stream: the tokens of all documents, one document after the other."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.types import HostBatch
from tvq_haiku.utils import checks


@dataclasses.dataclass(frozen=True)
class TokenStream:
  """Tokens in memory or in a memory-mapped file, of which only the requested ones are read.

  The input of a target is the preceding token of its document; for the first token it is an eos.
  """

  values: np.ndarray  # [n], any integer dtype: tokens minus `offset`; may be a memory map
  ends: np.ndarray  # [d] int64, d documents, ascending: one past each document's last token
  offset: int = 0  # added to `values`

  def __post_init__(self):
    checks.check_arrays(
      "TokenStream",
      chex.Dimensions(),
      values=(self.values, "n", jnp.integer),
      ends=(self.ends, "d", jnp.integer),
    )

  def __len__(self) -> int:
    return len(self.values)

  def head(self, n: int) -> TokenStream:
    """Returns the stream of the first `n` tokens; its last document may be incomplete."""
    ends = self.ends[: np.searchsorted(self.ends, n, side="right")]
    divides_document = n < len(self) and (not len(ends) or ends[-1] < n)
    return TokenStream(
      self.values[:n], np.append(ends, n) if divides_document else ends, self.offset
    )

  def take(self, index: npt.ArrayLike) -> HostBatch:
    """Returns the tokens at the positions `index` as part of a batch.

    Args:
      index: integers of any shape in [0, len(self)).

    Returns:
      `inputs`, `targets` and `doc_ids`, int32 arrays of the shape of `index`. The targets are the
      tokens at `index`.

    >>> batch = stream_of([np.array([5, 6]), np.array([7])]).take(np.arange(5))
    >>> batch["inputs"].tolist(), batch["targets"].tolist(), batch["doc_ids"].tolist()
    ([1, 5, 6, 1, 7], [5, 6, 1, 7, 1], [0, 0, 0, 1, 1])
    """
    index = np.asarray(index)
    doc_ids = np.searchsorted(self.ends, index, side="right").astype(np.int32)
    starts = np.where(doc_ids == 0, 0, self.ends[np.maximum(doc_ids - 1, 0)])
    preceding = self._tokens(np.maximum(index - 1, 0))
    return {
      "inputs": np.where(index == starts, np.int32(ByteVocabulary.EOS), preceding),
      "targets": self._tokens(index),
      "doc_ids": doc_ids,
    }

  def _tokens(self, index: np.ndarray) -> np.ndarray:
    return self.values[index].astype(np.int32) + np.int32(self.offset)


def stream_of(documents: Sequence[np.ndarray], *, eos: int = ByteVocabulary.EOS) -> TokenStream:
  """Concatenates documents in memory, each followed by an `eos` token.

  Args:
    documents: arrays of tokens, each of shape [n] with n >= 1.
    eos: the token to append to each document.

  Returns:
    The stream, with int32 values.

  Raises:
    ValueError: there is no document, or a document is empty or not one-dimensional.
    TypeError: `documents` is one text or array, or a document does not hold integers.

  >>> len(stream_of([np.array([5, 6]), np.array([7])]))
  5
  """
  if isinstance(documents, (str, bytes)) or hasattr(documents, "dtype"):
    raise TypeError(
      "stream_of: documents must be a list of arrays of tokens, got one "
      f"{type(documents).__name__}: pass [tokens]."
    )
  for i, document in enumerate(documents):
    if isinstance(document, (str, bytes)) or not hasattr(document, "__len__"):
      raise TypeError(
        f"stream_of: documents[{i}] must be an array of tokens, got {type(document).__name__}. A "
        "text is encoded by a vocabulary: ByteVocabulary.encode(text)."
      )
  if not documents or any(len(document) == 0 for document in documents):
    raise ValueError(
      "stream_of: documents must hold at least one document, and no document may be empty."
    )
  documents = [np.asarray(document) for document in documents]
  for i, document in enumerate(documents):
    argument = {f"documents[{i}]": (document, "n", jnp.integer)}
    checks.check_arrays("stream_of", chex.Dimensions(), **argument)
  values = np.concatenate(
    [np.append(document.astype(np.int32), np.int32(eos)) for document in documents]
  )
  return TokenStream(values, np.cumsum([len(document) + 1 for document in documents]))
