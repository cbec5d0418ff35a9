"""Documents packed into [B, T] batches.

A batch is a dict of [B, T] int32 arrays: `inputs`, `targets`, `doc_ids`, `loss_mask`. Every
document ends in an eos token; inputs are targets shifted by one, so that a document's first token
is predicted from the eos before it. Negative `doc_ids` mark padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tvq_haiku.data.vocabulary import ByteVocabulary

Batch = dict[str, np.ndarray]


class TokenStream(NamedTuple):
  """Documents end to end."""

  inputs: np.ndarray  # [n] int32
  targets: np.ndarray  # [n] int32
  doc_ids: np.ndarray  # [n] int32, ascending


def stream_of(documents: Sequence[np.ndarray], *, eos: int = ByteVocabulary.EOS) -> TokenStream:
  """Joins documents (arrays of tokens), each closed by an eos.

  >>> stream = stream_of([np.array([5, 6]), np.array([7])])
  >>> stream.inputs.tolist(), stream.targets.tolist(), stream.doc_ids.tolist()
  ([1, 5, 6, 1, 7], [5, 6, 1, 7, 1], [0, 0, 0, 1, 1])
  """
  if not documents or any(len(document) == 0 for document in documents):
    raise ValueError("a stream needs at least one document, and no document may be empty.")
  targets = np.concatenate([np.append(document, eos) for document in documents]).astype(np.int32)
  inputs = np.append(eos, targets[:-1]).astype(np.int32)
  doc_ids = np.repeat(np.arange(len(documents)), [len(d) + 1 for d in documents])
  return TokenStream(inputs, targets, doc_ids.astype(np.int32))


class PackedBatches:
  """An endless, seeded iterator over training batches; its whole state is `step`.

  An epoch cuts the stream into sequences at an offset of its own and shuffles them. Batch `step`
  is a pure function of (seed, step): set `step` to go anywhere, in constant time.

  >>> batches = PackedBatches(stream_of([np.arange(3, 103)]), batch_size=2, sequence_len=10)
  >>> _, second = next(batches), next(batches)
  >>> batches.step = 1
  >>> bool((next(batches)["inputs"] == second["inputs"]).all())
  True
  """

  def __init__(self, stream: TokenStream, *, batch_size: int, sequence_len: int, seed: int = 0,
               step: int = 0):
    # Any offset below sequence_len leaves this many whole sequences.
    n_sequence = (len(stream.targets) - sequence_len + 1) // sequence_len
    if n_sequence < batch_size:
      raise ValueError(f"{len(stream.targets)} tokens do not fill one batch of {batch_size} "
                       f"sequences of {sequence_len} at every offset.")
    self.step = step
    self.steps_per_epoch = n_sequence // batch_size
    self._stream = stream
    self._shape = (batch_size, sequence_len)
    self._n_sequence = n_sequence
    self._seed = seed
    self._epoch: tuple[int, int, np.ndarray] | None = None

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    batch_size, sequence_len = self._shape
    epoch, place = divmod(self.step, self.steps_per_epoch)
    offset, order = self._shuffle(epoch)
    rows = order[place * batch_size : (place + 1) * batch_size]
    index = offset + rows[:, None] * sequence_len + np.arange(sequence_len)
    batch = {name: field[index] for name, field in self._stream._asdict().items()}
    self.step += 1
    return batch | {"loss_mask": np.ones(self._shape, np.int32)}

  def _shuffle(self, epoch: int) -> tuple[int, np.ndarray]:
    if self._epoch is None or self._epoch[0] != epoch:
      rng = np.random.default_rng((self._seed, epoch))
      self._epoch = (epoch, int(rng.integers(self._shape[1])), rng.permutation(self._n_sequence))
    return self._epoch[1:]


def count_windows(stream: TokenStream, *, batch_size: int, window_len: int) -> int:
  """How many batches `windows` yields."""
  row_len = -(-len(stream.targets) // batch_size)
  return -(-row_len // window_len)


def windows(stream: TokenStream, *, batch_size: int, window_len: int) -> Iterator[Batch]:
  """Reads the whole stream once, as B rows side by side, for evaluation with carried state.

  Row b is the b-th of B equal pieces; consecutive batches continue each row. Every token is in
  exactly one batch; what is left over of the last ones is padding.

  Args:
    stream: what to read.
    batch_size: B.
    window_len: T.
  """
  n = len(stream.targets)
  row_len = -(-n // batch_size)
  place = np.arange(batch_size)[:, None] * row_len
  for start in range(0, row_len, window_len):
    column = start + np.arange(window_len)
    index = place + column
    real = (column < row_len) & (index < n)
    index = np.where(real, index, 0)
    yield {
        "inputs": np.where(real, stream.inputs[index], ByteVocabulary.PAD),
        "targets": np.where(real, stream.targets[index], ByteVocabulary.PAD),
        "doc_ids": np.where(real, stream.doc_ids[index], np.int32(-1)),
        "loss_mask": real.astype(np.int32),
    }
