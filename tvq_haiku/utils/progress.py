"""How far a long loop has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import sys
import time
from typing import Protocol

from tvq_haiku.utils import optional

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
  """What a loop calls after each step."""

  def __call__(self, step: int, note: str = "") -> None:
    """Says that `step` steps are done, and something about them."""


def log(line: str) -> None:
  """A line on standard error, for people who wait."""
  print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def bar(name: str, total: int, start: int = 0, *, enabled: bool = True) -> Iterator[Progress]:
  """Shows progress from `start` to `total` on standard error.

  >>> with show("counting", 2) as progress:
  ...   progress(1, "one")
  """
  if not enabled:
    yield lambda step, note="": None
    return
  if sys.stderr.isatty():
    tqdm = optional.require("tqdm", extra="train", purpose="progress bars")
    # A bar inside of another one goes away when it is full.
    with tqdm.tqdm(
      total=total,
      initial=start,
      desc=name,
      leave=None,
      dynamic_ncols=True,
      bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} "
      "[{elapsed}<{remaining}] {postfix}",
    ) as bar:

      def update(step: int, note: str = "") -> None:
        bar.set_postfix_str(note, refresh=False)
        bar.update(step - bar.n)

      yield update
    return
  first = last = None  # the first step pays for compilation, and tells nothing of the rest

  def report(step: int, note: str = "") -> None:
    nonlocal first, last
    now = time.monotonic()
    parts = [f"{name} {step}/{total}", note]
    if first is None:
      first = (step, now)
    elif now - last < _SECONDS_BETWEEN_LINES and step < total:
      return
    elif step > first[0]:
      left = (now - first[1]) / (step - first[0]) * (total - step)
      parts.append(f"{left:.0f} s left")
    last = now
    print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)

  yield report
