"""Reads batches ahead of time and transfers them to devices, in a background thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import queue
import threading

import jax

from tvq_haiku.types import ArrayTree


@contextlib.contextmanager
def to_device(
  batches: Iterator[ArrayTree],
  *,
  ahead: int = 2,
  device_put: Callable[[ArrayTree], ArrayTree] = jax.device_put,
) -> Iterator[Iterator[ArrayTree]]:
  """Provides an iterator over `batches` on devices; leaving the context ends its thread.

  An exception that is raised by `batches` or `device_put` is raised again by the iterator, in
  place of the batch.

  Args:
    batches: batches in host memory.
    ahead: size of the queue of transferred batches; one more may wait for a free slot in it.
    device_put: transfers a batch to devices.

  Yields:
    An iterator over the transferred batches, in order.

  >>> with to_device(iter([1, 2])) as arrays:
  ...   [int(x) for x in arrays]
  [1, 2]
  """
  ready: queue.Queue[tuple[str, ArrayTree | BaseException | None]] = queue.Queue(maxsize=ahead)
  stopped = threading.Event()

  def put(kind: str, item: ArrayTree | BaseException | None) -> bool:
    """Waits for a free slot; returns whether the item was put there before the context ended."""
    while not stopped.is_set():
      try:
        ready.put((kind, item), timeout=0.1)
        return True
      except queue.Full:
        pass
    return False

  def read() -> None:
    try:
      for batch in batches:
        if not put("batch", device_put(batch)):
          return
      put("end", None)
    except BaseException as error:  # raised again by `transferred`
      put("error", error)

  def transferred() -> Iterator[ArrayTree]:
    while True:
      kind, item = ready.get()
      if kind == "error":
        raise item
      if kind == "end":
        return
      yield item

  reader = threading.Thread(target=read, name="prefetch", daemon=True)
  reader.start()
  try:
    yield transferred()
  finally:
    stopped.set()
    reader.join()
