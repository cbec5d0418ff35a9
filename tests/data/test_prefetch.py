"""Prefetched batches are complete and in order; errors are raised, and the thread ends."""

import threading
import time

import jax
import numpy as np
import pytest

from tvq_haiku.data import prefetch


def prefetch_threads():
  return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_batches_arrive_in_order_on_the_device():
  batches = [{"inputs": np.full((2, 3), i, np.int32)} for i in range(7)]
  with prefetch.to_device(iter(batches)) as prefetched:
    received = list(prefetched)
  assert [int(batch["inputs"][0, 0]) for batch in received] == list(range(7))
  assert all(isinstance(batch["inputs"], jax.Array) for batch in received)
  assert not prefetch_threads()


def test_only_a_few_batches_are_read_ahead():
  n_read = 0

  def endless():
    nonlocal n_read
    while True:
      n_read += 1
      yield n_read

  with prefetch.to_device(endless(), ahead=3) as prefetched:
    next(prefetched)
    deadline = time.monotonic() + 5
    while n_read < 4 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.05)
    assert 4 <= n_read <= 6
  assert not prefetch_threads()


def test_an_error_is_raised_in_place_of_its_batch():
  def broken():
    yield 1
    raise OSError("the disk is gone")

  with prefetch.to_device(broken()) as prefetched:
    assert int(next(prefetched)) == 1
    with pytest.raises(OSError, match="the disk is gone"):
      next(prefetched)


def test_an_error_of_device_put_is_raised():
  def fail(batch):
    raise RuntimeError(f"no memory for batch {batch}")

  with prefetch.to_device(iter([1]), device_put=fail) as prefetched:
    with pytest.raises(RuntimeError, match="no memory for batch 1"):
      next(prefetched)
  assert not prefetch_threads()


def test_an_error_in_the_context_ends_the_thread():
  with pytest.raises(KeyError), prefetch.to_device(iter(range(100))):
    raise KeyError
  assert not prefetch_threads()
