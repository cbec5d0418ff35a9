"""Batches of token sequences from a stream, for training and for evaluation.

A batch is a dict of [B, T] int32 arrays: `inputs`, `targets`, `doc_ids`, `loss_mask`. Negative
`doc_ids` mark padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tvq_haiku.data.stream import TokenStream
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.types import HostBatch


class _Epoch(NamedTuple):
  """The order in which one pass over the stream reads its sequences."""

  number: int
  offset: int  # position in the stream where sequence 0 starts
  order: np.ndarray  # [number of sequences] int64: a permutation


class PackedBatches:
  """An endless, seeded iterator over training batches, whose only state is `step`.

  `step` is the number of batches read so far.

  Each epoch divides the stream into sequences, from an offset that differs between epochs, and
  shuffles them. Batch `step` is a pure function of (seed, step): assigning to `step` moves the
  iterator to any batch in constant time.

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
    """Initializes the iterator.

    Args:
      stream: the tokens to read.
      batch_size: B, the number of sequences in a global batch.
      sequence_len: T, the number of tokens in a sequence.
      seed: determines the offsets and the orders of all epochs.
      step: index of the first batch to yield.
      aligned: whether sequences start at multiples of `sequence_len` in every epoch, which keeps
        documents of a fixed length complete.
      host: index of this host, in [0, n_host).
      n_host: number of hosts. Each yields its own B / n_host examples of every global batch.

    Raises:
      ValueError: the stream is too short for one batch, or the hosts cannot share a batch.
    """
    max_offset = 0 if aligned else sequence_len - 1  # largest offset of an epoch
    n_sequence = (len(stream) - max_offset) // sequence_len
    if n_sequence < batch_size:
      raise ValueError(
        f"the stream has {len(stream)} tokens, but batches of batch_size={batch_size} sequences of "
        f"sequence_len={sequence_len} tokens need {batch_size * sequence_len + max_offset}: reduce "
        "global_batch_size or sequence_len, or use more data."
      )
    if batch_size % n_host or not 0 <= host < n_host:
      raise ValueError(
        f"n_host={n_host} must divide batch_size={batch_size}, and host={host} must lie in "
        f"[0, {n_host})."
      )
    self.step = step
    self.steps_per_epoch = n_sequence // batch_size
    self._stream = stream
    self._shape = (batch_size, sequence_len)
    self._host_examples = slice(host * batch_size // n_host, (host + 1) * batch_size // n_host)
    self._n_sequence = n_sequence
    self._seed = seed
    self._aligned = aligned
    self._epoch: _Epoch | None = None

  def __iter__(self) -> Iterator[HostBatch]:
    return self

  def __next__(self) -> HostBatch:
    batch_size, sequence_len = self._shape
    epoch_number, batch_index = divmod(self.step, self.steps_per_epoch)
    epoch = self._open_epoch(epoch_number)
    sequences = epoch.order[batch_index * batch_size :][:batch_size][self._host_examples]
    index = epoch.offset + sequences[:, None] * sequence_len + np.arange(sequence_len)
    self.step += 1
    return self._stream.take(index) | {"loss_mask": np.ones(index.shape, np.int32)}

  def _open_epoch(self, number: int) -> _Epoch:
    if self._epoch is None or self._epoch.number != number:
      rng = np.random.default_rng((self._seed, number))
      # Sampled even if it is not used, so that the order does not depend on `aligned`.
      offset = int(rng.integers(self._shape[1]))
      order = rng.permutation(self._n_sequence)
      self._epoch = _Epoch(number, 0 if self._aligned else offset, order)
    return self._epoch


def count_windows(stream: TokenStream, *, batch_size: int, window_len: int, align: int = 1) -> int:
  """Returns the number of batches that `windows` yields for the same arguments.

  Args:
    stream: the tokens to read.
    batch_size: B.
    window_len: T.
    align: see `windows`.
  """
  return -(-_tokens_per_example(stream, batch_size, align) // window_len)


def windows(
  stream: TokenStream, *, batch_size: int, window_len: int, align: int = 1
) -> Iterator[HostBatch]:
  """Reads the stream once, in consecutive windows, for evaluation with carried state.

  The stream is divided into B contiguous sequences of equal length, one per example. Each batch
  holds the next T tokens of every sequence. Every token is in exactly one batch; the ends of the
  last sequences and of the last batch are padding.

  Args:
    stream: the tokens to read.
    batch_size: B, the number of sequences that are read in parallel.
    window_len: T, the number of tokens per example and batch.
    align: the sequences start at multiples of this number of tokens, which keeps documents of
      this length complete.

  Yields:
    Batches of shape [B, T]; padding has `doc_ids` -1 and `loss_mask` 0.
  """
  example_len = _tokens_per_example(stream, batch_size, align)
  starts = np.arange(batch_size)[:, None] * example_len
  for window_start in range(0, example_len, window_len):
    position = window_start + np.arange(window_len)
    index = starts + position
    is_token = (position < example_len) & (index < len(stream))
    batch = stream.take(np.where(is_token, index, 0))
    padding = {"inputs": ByteVocabulary.PAD, "targets": ByteVocabulary.PAD, "doc_ids": -1}
    yield {
      name: np.where(is_token, batch[name], np.int32(value)) for name, value in padding.items()
    } | {"loss_mask": is_token.astype(np.int32)}


def _tokens_per_example(stream: TokenStream, batch_size: int, align: int) -> int:
  return -(-len(stream) // (batch_size * align)) * align
