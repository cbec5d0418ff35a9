"""Batches that are on the device before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import queue
import threading
from typing import Any

import jax


@contextlib.contextmanager
def to_device(
  batches: Iterator[Any], *, ahead: int = 2, device_put: Callable[[Any], Any] = jax.device_put
) -> Iterator[Iterator[Any]]:
  """Reads `batches` in a thread of its own, `ahead` of them in advance, and has `device_put` put them on devices.

  What the iterator raises is raised where its batch would have come; leaving the context ends the
  thread.

  >>> with to_device(iter([1, 2])) as arrays:
  ...   [int(x) for x in arrays]
  [1, 2]
  """
  ready: queue.Queue = queue.Queue(maxsize=ahead)
  ended = threading.Event()

  def put(item: tuple[str, Any]) -> bool:
    while not ended.is_set():
      try:
        ready.put(item, timeout=0.1)
        return True
      except queue.Full:
        pass
    return False

  def read() -> None:
    try:
      for batch in batches:
        if not put(("batch", device_put(batch))):
          return
      put(("end", None))
    except BaseException as error:  # handed over, not lost with the thread
      put(("error", error))

  def arrays() -> Iterator[Any]:
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
    yield arrays()
  finally:
    ended.set()
    reader.join()
