"""How far a long loop has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import sys
import time
from typing import Protocol

from tvq_haiku import extras

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
  """What a loop calls after each step."""

  def __call__(self, step: int, note: str = "") -> None:
    """Says that `step` steps are done, and something about them."""


@contextlib.contextmanager
def show(name: str, total: int, start: int = 0) -> Iterator[Progress]:
  """Shows progress from `start` to `total` on standard error.

  >>> with show("counting", 2) as progress:
  ...   progress(1, "one")
  """
  if sys.stderr.isatty():
    tqdm = extras.load("tqdm", extra="train", purpose="progress bars")
    with tqdm.tqdm(total=total, initial=start, desc=name, leave=True, dynamic_ncols=True,
                   bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} "
                              "[{elapsed}<{remaining}] {postfix}") as bar:
      def update(step: int, note: str = "") -> None:
        bar.set_postfix_str(note, refresh=False)
        bar.update(step - bar.n)
      yield update
    return
  begin = last = time.monotonic()

  def report(step: int, note: str = "") -> None:
    nonlocal last
    now = time.monotonic()
    if now - last < _SECONDS_BETWEEN_LINES and step < total:
      return
    last = now
    left = (now - begin) / max(step - start, 1) * (total - step)
    print(f"{name} {step}/{total}  {note}  {left:.0f} s left".replace("    ", "  "),
          file=sys.stderr, flush=True)

  yield report
