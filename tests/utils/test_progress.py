"""Progress bars on a terminal, and status lines elsewhere."""

import io
import sys
import time

import pytest

from tvq_haiku.utils import progress


class Terminal(io.StringIO):
  """A replacement for standard error that claims to be a terminal."""

  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """Returns a list whose only element is the time in seconds that `time.monotonic` returns."""
  seconds = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
  return seconds


def test_status_lines(capsys, clock):
  with progress.bar("training", 100, 10) as update:
    for step, seconds in ((12, 50), (14, 52), (16, 60), (18, 60), (98, 69.9), (100, 69.9)):
      clock[0] = 100.0 + seconds
      update(step, f"loss {step}")
  assert capsys.readouterr().err.splitlines() == [
    "training 12/100  loss 12",  # no estimate: the first call includes compilation
    # Nothing at step 14, 2 s after the last line.
    "training 16/100  loss 16  210 s left",  # 10 s for 4 steps
    # Nothing at step 98, 9.9 s after the last line. The last step is always shown.
    "training 100/100  loss 100  0 s left",
  ]


def test_status_line_without_a_note(capsys):
  with progress.bar("scoring", 1) as update:
    update(1)
  assert capsys.readouterr().err == "scoring 1/1\n"


def test_bar_on_a_terminal(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stderr", terminal)
  with progress.bar("training", 8, 2) as update:
    update(4, "loss 1.5")
    update(8, "loss 1.0")
  first, *_, last = [frame for frame in terminal.getvalue().split("\r") if frame.strip()]
  assert first.startswith("training  25% |") and "| 2/8 [" in first
  assert last.startswith("training 100% |") and "| 8/8 [" in last and "loss 1.0" in last


def test_disabled_bar_shows_nothing(capsys):
  with progress.bar("training", 2, enabled=False) as update:
    update(1, "note")
    update(2)
  assert capsys.readouterr() == ("", "")


def test_log_writes_to_standard_error(capsys):
  progress.log("warning: text")
  assert capsys.readouterr() == ("", "warning: text\n")
