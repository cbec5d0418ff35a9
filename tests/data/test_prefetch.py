"""Batches read ahead: the same, in order, with their errors, and no thread left behind."""

import threading
import time

import jax
import numpy as np
import pytest

from tvq_haiku.data import prefetch


def threads():
  return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_same_in_order_on_the_device():
  batches = [{"inputs": np.full((2, 3), i, np.int32)} for i in range(7)]
  with prefetch.to_device(iter(batches)) as ready:
    got = list(ready)
  assert [int(batch["inputs"][0, 0]) for batch in got] == list(range(7))
  assert all(isinstance(batch["inputs"], jax.Array) for batch in got)
  assert not threads()


def test_reads_ahead_but_not_everything():
  read = []

  def endless():
    while True:
      read.append(1)
      yield len(read)

  with prefetch.to_device(endless(), ahead=3) as ready:
    next(ready)
    deadline = time.monotonic() + 5
    while len(read) < 4 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.05)
    assert 4 <= len(read) <= 6
  assert not threads()


def test_errors_come_where_their_batch_would_have():
  def broken():
    yield 1
    raise OSError("the disk is gone")

  with prefetch.to_device(broken()) as ready:
    assert int(next(ready)) == 1
    with pytest.raises(OSError, match="the disk is gone"):
      next(ready)


def test_an_error_outside_ends_the_thread():
  with pytest.raises(KeyError), prefetch.to_device(iter(range(100))):
    raise KeyError
  assert not threads()
