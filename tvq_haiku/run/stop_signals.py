"""Stopping a loop between two steps when the user or the system sends a signal."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import signal
import threading
import types

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalStopRequest:
  """A `StopRequest` that becomes true when SIGINT or SIGTERM arrives."""

  def __init__(self):
    self._is_requested = False

  def __bool__(self) -> bool:
    return self._is_requested

  def handle_signal(self, signal_number: int, frame: types.FrameType | None) -> None:
    """Requests the stop, and lets the next signal end the process at once.

    If the process ends at once, the updates since the last checkpoint are lost. Checkpoints are
    written atomically.
    """
    del signal_number, frame
    self._is_requested = True
    for number in _SIGNALS:
      signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[SignalStopRequest]:
  """Turns SIGINT (Ctrl-C) and SIGTERM into a stop request, so that a step is never interrupted.

  The previous handlers are restored when the context ends. Only the main thread can receive
  signals; in other threads, the request stays false.
  """
  request = SignalStopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  previous = {number: signal.signal(number, request.handle_signal) for number in _SIGNALS}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
