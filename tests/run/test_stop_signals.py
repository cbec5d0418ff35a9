"""Signals become stop requests, but only while the context is open."""

import os
import signal
import threading

import pytest

from tvq_haiku.run import stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_requests_a_stop(number):
  previous = signal.getsignal(number)
  with stop_signals.stop_on_signals() as request:
    assert not request
    os.kill(os.getpid(), number)
    assert request
    # A second signal ends the process at once.
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  assert signal.getsignal(number) is previous


def test_handlers_are_restored_after_an_error():
  previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with pytest.raises(RuntimeError, match="in the loop"):
    with stop_signals.stop_on_signals():
      raise RuntimeError("in the loop")
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == previous


def test_other_threads_leave_the_handlers_alone():
  handlers = []

  def loop():
    with stop_signals.stop_on_signals() as request:
      handlers.append((signal.getsignal(signal.SIGINT), bool(request)))

  worker = threading.Thread(target=loop)
  worker.start()
  worker.join()
  assert handlers == [(signal.getsignal(signal.SIGINT), False)]
