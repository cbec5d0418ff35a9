"""Kills a training run many times and compares its result with that of an uninterrupted run.

  python -m experiments.reliability.kill_and_resume --kills=40

The run is killed (SIGKILL) and resumed again and again: while data are encoded, while a checkpoint
is written, during a validation, or at a random time. At the end, the parameters, the optimizer
state, the RNG key, the position in the data and all log records except those of speed must be
bitwise equal to those of the uninterrupted run.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from absl import flags
import jax
import numpy as np

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.run import best_checkpoint, metric_writers

_KILLS = flags.DEFINE_integer("kills", 30, "Number of kills.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the times at which the run is killed.")
_UPDATES = flags.DEFINE_integer("updates", 1500, "Number of updates of the run.", lower_bound=1)

# Metrics that may differ between two equal runs: they depend on the speed or on the last start.
_NOT_REPRODUCIBLE = ("tokens_per_second", "flops_per_second", "skipped_since_start")
_TIMEOUT_SECONDS = 300
_VALIDATE_EVERY = 200  # updates

IsTime = Callable[[], bool]  # returns whether the run is to be killed now


class Kill(NamedTuple):
  """The effect of one kill."""

  kind: str  # a key of _KINDS
  step: int  # updates in the newest checkpoint afterwards
  n_lost: int  # updates whose progress was shown, but that are not in a checkpoint


def main() -> None:
  """Trains both runs, compares them, and prints how often each kind of kill was survived."""
  rng, n_update = random.Random(_SEED.value), _UPDATES.value
  with tempfile.TemporaryDirectory() as directory:
    uninterrupted = pathlib.Path(directory) / "uninterrupted"
    killed = pathlib.Path(directory) / "killed"
    _run_to_the_end(uninterrupted, n_update)
    kills = []
    for i in range(_KILLS.value):
      kills.append(_kill_once(killed, n_update, rng))
      print(f"{i + 1:3d}  {kills[-1].kind:<24} last checkpoint: {kills[-1].step}", flush=True)
    _run_to_the_end(killed, n_update)
    _check_equal(uninterrupted, killed)
  print(f"\n{'killed':<26}{'times':>6}{'survived':>10}")
  for kind, n in sorted(Counter(kill.kind for kill in kills).items()):
    print(f"{kind:<26}{n:>6}{n:>10}")
  print(
    f"\nAfter {len(kills)} kills, the run is bitwise equal to the uninterrupted run; a kill lost "
    f"at most {max(kill.n_lost for kill in kills)} of the updates whose progress was shown."
  )


def _start(workdir: pathlib.Path, n_update: int) -> subprocess.Popen:
  """Starts the training run of `workdir`, or resumes it."""
  arguments = [
    "experiments.text",
    "--smoke",
    f"--workdir={workdir}",
    "--save_seconds=0.3",
    f"--config.n_max_step={n_update}",
    f"--validate_every={_VALIDATE_EVERY}",
    "--eval_window=8",
    "--log_every=10",
  ]
  return subprocess.Popen(
    [sys.executable, "-m", *arguments],
    text=True,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )


def _run_to_the_end(workdir: pathlib.Path, n_update: int) -> None:
  """Trains until the run is complete."""
  process = _start(workdir, n_update)
  _, messages = process.communicate(timeout=_TIMEOUT_SECONDS)
  if process.returncode:
    last_line = (messages.strip().splitlines() or ["no message"])[-1]
    raise ValueError(f"the run failed with exit status {process.returncode}: {last_line}")


def _kill_once(workdir: pathlib.Path, n_update: int, rng: random.Random) -> Kill:
  """Resumes the run and kills it in one of the ways of `_KINDS`, selected at random.

  Args:
    workdir: directory of the run.
    n_update: number of updates of the run.
    rng: source of randomness for the kind and the time of the kill.
  """
  kind = rng.choice(sorted(_KINDS))
  is_time, before = _KINDS[kind](workdir, rng), run_directory.latest_step(workdir) or 0
  messages = _run_until(is_time, workdir, n_update)
  shown = [
    int(line.split()[1].partition("/")[0]) for line in messages if line.startswith("training ")
  ]
  after = run_directory.latest_step(workdir) or 0
  return Kill(kind, after, max(max([before, *shown]) - after, 0))


def _run_until(is_time: IsTime, workdir: pathlib.Path, n_update: int) -> Sequence[str]:
  """Kills the run when `is_time` returns True, unless it ends earlier, and returns its messages."""
  process, deadline = _start(workdir, n_update), time.monotonic() + _TIMEOUT_SECONDS
  while process.poll() is None and not is_time() and time.monotonic() < deadline:
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  _, messages = process.communicate()
  return messages.splitlines()


class _Delayed:
  """A condition that becomes true some seconds after another condition first was true."""

  def __init__(self, condition: IsTime, seconds: float):
    self._condition, self._seconds = condition, seconds
    self._since: float | None = None

  def __call__(self) -> bool:
    if self._since is None and self._condition():
      self._since = time.monotonic()
    return self._since is not None and time.monotonic() > self._since + self._seconds


def _at_random(workdir: pathlib.Path, rng: random.Random) -> IsTime:
  """Returns a condition that becomes true after a random time."""
  del workdir
  deadline = time.monotonic() + rng.uniform(0.5, 8.0)
  return lambda: time.monotonic() > deadline


def _while_writing_a_checkpoint(workdir: pathlib.Path, rng: random.Random) -> IsTime:
  """Returns a condition that becomes true while the run writes a checkpoint, latest or best."""
  n_checkpoint, seen = rng.randint(1, 3), set()
  is_best = rng.random() < 0.3
  directory = workdir / "best" / "checkpoints" if is_best else workdir / "checkpoints"

  def is_time() -> bool:
    seen.update(path.name for path in directory.glob("*tmp*"))
    return len(seen) >= n_checkpoint

  return is_time


def _during_an_evaluation(workdir: pathlib.Path, rng: random.Random) -> IsTime:
  """Returns a condition that becomes true soon after the checkpoint that precedes a validation."""
  validated = max(best_checkpoint.read_validations(workdir).step, 0)
  next_step = (validated // _VALIDATE_EVERY + 1) * _VALIDATE_EVERY
  return _Delayed(
    lambda: any(step >= next_step for step in run_directory.saved_steps(workdir)),
    rng.uniform(0.0, 0.15),
  )


def _while_encoding_data(workdir: pathlib.Path, rng: random.Random) -> IsTime:
  """Removes the encoded data; returns a condition that becomes true while they are re-encoded."""
  cache = workdir / "cache"
  shutil.rmtree(cache, ignore_errors=True)
  return _Delayed(lambda: cache.is_dir() and any(cache.iterdir()), rng.uniform(0.0, 0.02))


_KINDS = {
  "at random": _at_random,
  "writing a checkpoint": _while_writing_a_checkpoint,
  "in an evaluation": _during_an_evaluation,
  "encoding data": _while_encoding_data,
}


def _check_equal(uninterrupted: pathlib.Path, killed: pathlib.Path) -> None:
  """Raises a ValueError if the two runs differ."""
  want, got = (tvq.load_checkpoint(workdir) for workdir in (uninterrupted, killed))
  equal = jax.tree.map(
    lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()),
    (got.train_state, jax.random.key_data(got.rng), got.data_step),
    (want.train_state, jax.random.key_data(want.rng), want.data_step),
  )
  if not jax.tree.all(equal):
    raise ValueError("the parameters, the optimizer state or the position in the data differ.")
  if _reproducible_records(uninterrupted) != _reproducible_records(killed):
    raise ValueError("the log records differ.")
  if best_checkpoint.read_validations(uninterrupted) != best_checkpoint.read_validations(killed):
    raise ValueError("the validations or the best checkpoints differ.")


def _reproducible_records(workdir: pathlib.Path) -> list[dict[str, Any]]:
  records: Iterable[dict[str, Any]] = metric_writers.read_records(workdir)
  return [
    {name: value for name, value in record.items() if name not in _NOT_REPRODUCIBLE}
    for record in records
  ]


if __name__ == "__main__":
  launcher.launch("kill_and_resume", main)
