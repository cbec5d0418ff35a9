"""Documents packed into [B, T] batches.

A batch is a dict of [B, T] int32 arrays: `inputs`, `targets`, `doc_ids`, `loss_mask`. Negative
`doc_ids` mark padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tvq_haiku.data.stream import TokenStream
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.types import HostBatch


class PackedBatches:
  """An endless, seeded iterator over training batches; its whole state is `step`.

  An epoch cuts the stream into sequences at an offset of its own and shuffles them. Batch `step`
  is a pure function of (seed, step): set `step` to go anywhere, in constant time.

  >>> from tvq_haiku.data.stream import stream_of
  >>> batches = PackedBatches(stream_of([np.arange(3, 103)]), batch_size=2, sequence_len=10)
  >>> _, second = next(batches), next(batches)
  >>> batches.step = 1
  >>> bool((next(batches)["inputs"] == second["inputs"]).all())
  True
  """

  def __init__(
    self,
    stream: TokenStream,
    *,
    batch_size: int,
    sequence_len: int,
    seed: int = 0,
    step: int = 0,
    aligned: bool = False,
    host: int = 0,
    n_host: int = 1,
  ):
    """Args are the following.

    Args:
      stream: what to read.
      batch_size: B of the global batch.
      sequence_len: T.
      seed: another one, another order.
      step: the batch to begin with.
      aligned: sequences begin at multiples of their length, as documents that are all as long need.
      host: which of the hosts this is; each gets B/n_host rows of a global batch, and together they
        get all of it.
      n_host: how many there are.
    """
    # Any offset below sequence_len leaves this many whole sequences.
    n_sequence = (len(stream) - (0 if aligned else sequence_len - 1)) // sequence_len
    if n_sequence < batch_size:
      raise ValueError(
        f"{len(stream)} tokens do not fill one batch of {batch_size} "
        f"sequences of {sequence_len}, wherever they begin: take fewer or shorter ones "
        "(global_batch_size, sequence_len), or more data."
      )
    if batch_size % n_host or not 0 <= host < n_host:
      raise ValueError(
        f"host={host} of n_host={n_host} has no share of batch_size={batch_size} "
        "rows: n_host must divide it, and host be less than n_host."
      )
    self.step = step
    self.steps_per_epoch = n_sequence // batch_size
    self._stream = stream
    self._shape = (batch_size, sequence_len)
    self._mine = slice(host * batch_size // n_host, (host + 1) * batch_size // n_host)
    self._n_sequence = n_sequence
    self._seed = seed
    self._aligned = aligned
    self._epoch: tuple[int, int, np.ndarray] | None = None

  def __iter__(self) -> Iterator[HostBatch]:
    return self

  def __next__(self) -> HostBatch:
    batch_size, sequence_len = self._shape
    epoch, place = divmod(self.step, self.steps_per_epoch)
    offset, order = self._shuffle(epoch)
    rows = order[place * batch_size : (place + 1) * batch_size][self._mine]
    index = offset + rows[:, None] * sequence_len + np.arange(sequence_len)
    self.step += 1
    return self._stream.take(index) | {"loss_mask": np.ones(index.shape, np.int32)}

  def _shuffle(self, epoch: int) -> tuple[int, np.ndarray]:
    if self._epoch is None or self._epoch[0] != epoch:
      rng = np.random.default_rng((self._seed, epoch))
      offset = int(rng.integers(self._shape[1]))
      self._epoch = (epoch, 0 if self._aligned else offset, rng.permutation(self._n_sequence))
    return self._epoch[1:]


def count_windows(stream: TokenStream, *, batch_size: int, window_len: int, align: int = 1) -> int:
  """How many batches `windows` yields."""
  return -(-_row_len(stream, batch_size, align) // window_len)


def windows(
  stream: TokenStream, *, batch_size: int, window_len: int, align: int = 1
) -> Iterator[HostBatch]:
  """Reads the whole stream once, as B rows side by side, for evaluation with carried state.

  Row b is the b-th of B equal pieces; consecutive batches continue each row. Every token is in
  exactly one batch; what is left over of the last ones is padding.

  Args:
    stream: what to read.
    batch_size: B.
    window_len: T.
    align: pieces begin at multiples of it, so that no document of this length is cut in two.
  """
  row_len = _row_len(stream, batch_size, align)
  place = np.arange(batch_size)[:, None] * row_len
  for start in range(0, row_len, window_len):
    column = start + np.arange(window_len)
    index = place + column
    real = (column < row_len) & (index < len(stream))
    batch = stream.take(np.where(real, index, 0))
    padding = {"inputs": ByteVocabulary.PAD, "targets": ByteVocabulary.PAD, "doc_ids": -1}
    yield {
      name: np.where(real, batch[name], np.int32(value)) for name, value in padding.items()
    } | {"loss_mask": real.astype(np.int32)}


def _row_len(stream: TokenStream, batch_size: int, align: int) -> int:
  return -(-len(stream) // (batch_size * align)) * align
