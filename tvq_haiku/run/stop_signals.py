"""Reactions to SIGINT (Ctrl-C) and SIGTERM that do not wait for the main thread.

Python runs signal handlers in the main thread, between two bytecodes. While XLA compiles or a
device computes, a handler waits for seconds, and two signals become one. Therefore, a thread reads
the signals from a pipe, into which the interpreter writes each of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import os
import signal
import sys
import threading
import types

from tvq_haiku.utils import progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 1.0  # for the main thread, to clean up after an interrupt

Handler = Callable[[int, types.FrameType | None], None]


class SignalStopRequest:
  """A `StopRequest` that becomes true when SIGINT or SIGTERM arrives."""

  def __init__(self):
    self._is_requested = False

  def __bool__(self) -> bool:
    return self._is_requested

  def handle_signal(self, signal_number: int, frame: types.FrameType | None) -> None:
    """Requests the stop; a handler for `signal.signal`."""
    del signal_number, frame
    self._is_requested = True


@contextlib.contextmanager
def stop_on_signals(note: str | None = None) -> Iterator[SignalStopRequest]:
  """Turns the first SIGINT (Ctrl-C) or SIGTERM into a stop request; the second ends the process.

  If the process ends, its exit status is 128 plus the number of the signal. What was not saved is
  lost; files that are written atomically stay intact. The previous handlers are restored when the
  context ends. Only the main thread can receive signals; in other threads, the request stays false.

  Args:
    note: line that the first signal writes to standard error at once; None: no line.

  Yields:
    The stop request.
  """
  request = SignalStopRequest()

  def react(count: int, number: int) -> None:
    if count > 1:
      os._exit(128 + number)
    elif note is not None:
      _log(note)

  with watch(_SIGNALS, request.handle_signal, react):
    yield request


class Interruption:
  """Ends a command on Ctrl-C: with one line at once, and exit status 130 within a second.

  The main thread gets a `KeyboardInterrupt`, so that it can remove incomplete files. If that takes
  longer than a second, or if a second Ctrl-C arrives, the process ends without waiting for it.
  """

  def __init__(self, note: str):
    self._note: str | None = note
    self._lock = threading.Lock()

  def announce(self) -> None:
    """Writes the note to standard error, unless that has been done."""
    with self._lock:
      note, self._note = self._note, None
      if note is not None:
        _log(note)

  def watch(self) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which Ctrl-C has this effect."""
    return watch([signal.SIGINT], signal.default_int_handler, self._react)

  def _react(self, count: int, number: int) -> None:
    if count > 1:
      os._exit(128 + number)
    else:
      timer = threading.Timer(_GRACE_SECONDS, os._exit, [128 + number])
      timer.daemon = True
      timer.start()
      self.announce()


@contextlib.contextmanager
def watch(
  signals: Sequence[signal.Signals], handler: Handler, react: Callable[[int, int], None]
) -> Iterator[None]:
  """Reacts to signals in a thread at once, and in the main thread as soon as that is possible.

  Does nothing outside of the main thread.

  Args:
    signals: the signals.
    handler: called in the main thread with the number of the signal and the current frame. Several
      signals may become one call.
    react: called in another thread with the count of the signals so far, and the number of the
      last one.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  watcher = threading.Thread(target=_read_signals, args=(reader, signals, react), daemon=True)
  watcher.start()
  previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  previous = {number: signal.signal(number, handler) for number in signals}
  try:
    yield
  finally:
    for number, previous_handler in previous.items():
      signal.signal(number, previous_handler)
    signal.set_wakeup_fd(previous_writer)
    os.write(writer, b"\0")  # ends the thread; no signal has the number 0
    watcher.join()
    os.close(reader)
    os.close(writer)


def _read_signals(
  reader: int, signals: Sequence[signal.Signals], react: Callable[[int, int], None]
) -> None:
  """Reacts to the signals whose numbers are written to a pipe, until a 0 is written.

  Args:
    reader: file descriptor of the pipe. The interpreter writes all signals that have a handler.
    signals: the signals to react to.
    react: called with the count of the signals so far, and the number of the last one.
  """
  count = 0
  while number := os.read(reader, 1)[0]:
    if number in signals:
      count += 1
      with contextlib.suppress(OSError):  # standard error may be closed
        react(count, number)


def _log(note: str) -> None:
  """Writes a line to standard error; on a terminal, on a line after ^C or a progress bar."""
  progress.log(f"\n{note}" if sys.stderr.isatty() else note)
