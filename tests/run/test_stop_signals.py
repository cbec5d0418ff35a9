"""Signals become stop requests or end a command, but only while the context is open."""

import hashlib
import os
import signal
import threading
import time

import pytest

from tvq_haiku.run import stop_signals


@pytest.fixture
def ended(monkeypatch):
  """Replaces `os._exit`; returns a list of the exit statuses and the times of its calls."""
  calls = []
  monkeypatch.setattr(os, "_exit", lambda status: calls.append((status, time.monotonic())))
  return calls


def block_main_thread():
  """Blocks the main thread in C code that releases the GIL, as XLA does when it compiles."""
  hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 1_000_000)


def send_later(*numbers):
  """Sends signals to this process in 0.1 s, 20 ms apart."""

  def send():
    time.sleep(0.1)
    for number in numbers:
      os.kill(os.getpid(), number)
      time.sleep(0.02)

  threading.Thread(target=send).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_requests_a_stop(number, ended, capsys):
  previous = signal.getsignal(number)
  with stop_signals.stop_on_signals("stopping") as request:
    assert not request
    os.kill(os.getpid(), number)
    assert request
  assert signal.getsignal(number) is previous
  assert not ended and capsys.readouterr().err == "stopping\n"


def test_signal_is_answered_while_the_main_thread_is_blocked(monkeypatch):
  noted = []
  monkeypatch.setattr(
    stop_signals.progress, "log", lambda note: noted.append((note, time.monotonic()))
  )
  with stop_signals.stop_on_signals("stopping") as request:
    send_later(signal.SIGINT)
    block_main_thread()
    unblocked = time.monotonic()
  ((note, noted_at),) = noted
  assert note == "stopping" and noted_at < unblocked - 0.05 and request


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_the_process_while_the_main_thread_is_blocked(ended, second):
  with stop_signals.stop_on_signals():
    send_later(signal.SIGINT, second)
    block_main_thread()
    unblocked = time.monotonic()
  ((status, ended_at),) = ended
  assert status == 128 + second and ended_at < unblocked - 0.05


def test_interrupted_command_writes_one_line_and_raises(ended, capsys):
  interruption = stop_signals.Interruption("demo: interrupted.")
  with pytest.raises(KeyboardInterrupt):
    with interruption.watch():
      os.kill(os.getpid(), signal.SIGINT)
      block_main_thread()
  interruption.announce()  # has been announced
  assert not ended and capsys.readouterr().err == "demo: interrupted.\n"


@pytest.mark.parametrize("n_signal", [1, 2])
def test_interrupted_command_ends_although_its_main_thread_is_blocked(ended, monkeypatch, n_signal):
  monkeypatch.setattr(stop_signals, "_GRACE_SECONDS", 0.05)
  with pytest.raises(KeyboardInterrupt):
    with stop_signals.Interruption("demo: interrupted.").watch():
      send_later(*[signal.SIGINT] * n_signal)
      block_main_thread()
  assert [status for status, _ in ended] == [128 + signal.SIGINT] * n_signal


def test_other_signals_are_left_to_their_handlers(ended):
  calls = []
  previous = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
  try:
    with stop_signals.stop_on_signals() as request:
      os.kill(os.getpid(), signal.SIGUSR1)
      os.kill(os.getpid(), signal.SIGUSR1)
  finally:
    signal.signal(signal.SIGUSR1, previous)
  assert calls == [signal.SIGUSR1] * 2 and not request and not ended


def test_handlers_are_restored_after_an_error():
  previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with pytest.raises(RuntimeError, match="in the loop"):
    with stop_signals.stop_on_signals():
      raise RuntimeError("in the loop")
  assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == previous
  assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_leave_the_handlers_alone():
  handlers = []

  def loop():
    with stop_signals.stop_on_signals() as request:
      handlers.append((signal.getsignal(signal.SIGINT), bool(request)))

  worker = threading.Thread(target=loop)
  worker.start()
  worker.join()
  assert handlers == [(signal.getsignal(signal.SIGINT), False)]
