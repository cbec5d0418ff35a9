"""Hides messages of the checkpoint library that repeat what a command reports itself.

When a checkpoint cannot be written, orbax logs the error several times, in several threads, and
raises it in the main thread, where `launcher` reports it in one line. Only these messages are
hidden: errors in other threads and warnings of other libraries are shown.
"""

from __future__ import annotations

import logging
import sys
import threading
import types

from absl import logging as absl_logging

_CLOSED_LOOP = "Event loop is closed"


def hide_checkpoint_messages() -> None:
  """Hides log records and thread errors of orbax, from now on until the process ends."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_handler().addFilter(_is_not_from_orbax)
  threading.excepthook = _show_thread_error
  sys.unraisablehook = _show_unraisable_error


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
  """Returns whether to show a log record.

  Records of asyncio are hidden, too, because orbax is the only library here that uses it.
  """
  return "/orbax/" not in record.pathname and record.name != "asyncio"


def _show_thread_error(args: threading.ExceptHookArgs) -> None:
  """Reports an exception that ended a thread, unless the thread is one of orbax's."""
  if not _passes_through_orbax(args.exc_traceback):
    threading.__excepthook__(args)


def _passes_through_orbax(traceback: types.TracebackType | None) -> bool:
  while traceback is not None:
    if traceback.tb_frame.f_globals.get("__name__", "").startswith("orbax."):
      return True
    traceback = traceback.tb_next
  return False


def _show_unraisable_error(args: sys.UnraisableHookArgs) -> None:
  """Reports an exception that cannot be raised, unless it is expected.

  When one write fails, orbax closes its event loop while other writes are still in progress. A
  `KeyboardInterrupt` ends the command in any case: see `launcher`.
  """
  is_closed_loop = isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == _CLOSED_LOOP
  if not is_closed_loop and not issubclass(args.exc_type, KeyboardInterrupt):
    sys.__unraisablehook__(args)
