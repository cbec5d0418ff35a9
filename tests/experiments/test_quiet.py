"""Messages of orbax are hidden, and only those."""

import logging
import sys
import threading

from absl import logging as absl_logging
import pytest

from experiments import quiet


@pytest.fixture
def quieted(monkeypatch):
  """Hides the messages during one test."""
  handler, verbosity = absl_logging.get_absl_handler(), absl_logging.get_verbosity()
  monkeypatch.setattr(threading, "excepthook", threading.excepthook)
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
  monkeypatch.setattr(handler, "filters", [])
  quiet.hide_checkpoint_messages()
  yield handler
  absl_logging.set_verbosity(verbosity)


def record(name, path):
  return logging.LogRecord(name, logging.ERROR, path, 1, "message", (), None)


def test_log_records_of_orbax_and_its_event_loop_are_hidden(quieted):
  assert not quieted.filter(record("absl", "/lib/site-packages/orbax/checkpoint/manager.py"))
  assert not quieted.filter(record("asyncio", "/lib/asyncio/base_events.py"))


def test_log_records_of_others_are_shown(quieted):
  assert quieted.filter(record("absl", "/lib/tvq_haiku/data/sources/books.py"))
  assert quieted.filter(record("jax", "/lib/jax/_src/xla_bridge.py"))
  assert absl_logging.level_warning() and not absl_logging.level_info()


def run_in_thread(module):
  """Runs a failing function, whose module is named `module`, in a thread."""
  namespace = {"__name__": module}
  exec("def fail(): raise RuntimeError('no space')", namespace)
  thread = threading.Thread(target=namespace["fail"])
  thread.start()
  thread.join()


def test_errors_in_threads_of_orbax_are_hidden(quieted, capsys):
  run_in_thread("orbax.checkpoint.writer")
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("module", ["tvq_haiku.data.prefetch", "orbaxian"])
def test_errors_in_other_threads_are_shown(quieted, capsys, module):
  run_in_thread(module)
  assert "RuntimeError: no space" in capsys.readouterr().err


@pytest.mark.parametrize(
  "error, is_shown",
  [
    (RuntimeError("Event loop is closed"), False),
    (RuntimeError("other"), True),
    (KeyboardInterrupt(), False),
  ],
)
def test_unraisable_errors_are_shown_except_expected_ones(quieted, capsys, error, is_shown):
  class Failing:
    def __del__(self):
      raise error

  Failing()
  assert (type(error).__name__ in capsys.readouterr().err) == is_shown
