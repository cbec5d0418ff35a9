"""Progress of long loops on standard error: a bar on a terminal, status lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import sys
import time
from typing import Protocol

from tvq_haiku.utils import optional

_SECONDS_BETWEEN_LINES = 10.0
# tqdm puts a comma before the postfix.
_BAR_FORMAT = (
  "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
)


class Progress(Protocol):
  """A function that a loop calls after each step."""

  def __call__(self, step: int, note: str = "") -> None:
    """Shows that `step` steps are done, and a note such as the current loss."""


def log(line: str) -> None:
  """Writes a status line or a warning to standard error."""
  print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(name: str, total: int, start: int = 0, *, enabled: bool = True) -> Iterator[Progress]:
  """Shows the progress of a loop on standard error.

  Args:
    name: name of the loop, shown before the numbers.
    total: number of steps of the complete loop.
    start: number of steps that are already done.
    enabled: False shows nothing.

  Yields:
    The function to call after each step.

  Raises:
    ImportError: standard error is a terminal, and tqdm is not installed.

  >>> with bar("counting", 2) as progress:
  ...   progress(1, "one")
  """
  if not enabled:
    yield lambda step, note="": None
    return
  if not sys.stderr.isatty():
    yield _StatusLines(name, total)
    return
  tqdm = optional.require("tqdm", extra="train", purpose="progress bars")
  with tqdm.tqdm(
    total=total,
    initial=start,
    desc=name,
    leave=None,  # a bar inside another one disappears when it is full
    dynamic_ncols=True,
    bar_format=_BAR_FORMAT,
  ) as shown:

    def update(step: int, note: str = "") -> None:
      shown.set_postfix_str(note, refresh=False)
      shown.update(step - shown.n)

    yield update


class _StatusLines:
  """Logs a line for the first and the last step, and at most one per 10 s in between."""

  def __init__(self, name: str, total: int):
    self._name, self._total = name, total
    self._first: tuple[int, float] | None = None  # (step, time in s) of the first call
    self._last_time = 0.0  # time in s of the last line

  def __call__(self, step: int, note: str = "") -> None:
    """Logs the step, the note and the estimated time that is left."""
    now = time.monotonic()
    fields = [f"{self._name} {step}/{self._total}", note]
    if self._first is None:
      # The first step includes compilation, so the estimate counts from its end.
      self._first = (step, now)
    elif now - self._last_time < _SECONDS_BETWEEN_LINES and step < self._total:
      return
    elif step > self._first[0]:
      seconds_per_step = (now - self._first[1]) / (step - self._first[0])
      fields.append(f"{seconds_per_step * (self._total - step):.0f} s left")
    self._last_time = now
    log("  ".join(field for field in fields if field))
