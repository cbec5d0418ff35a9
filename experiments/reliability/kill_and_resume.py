"""Kills a training run again and again, and holds what comes of it against a run left in peace.

  python -m experiments.reliability.kill_and_resume --kills=40

Every start is killed (SIGKILL) at a moment of its kind: while data are encoded, while a checkpoint is
written, in an evaluation, or at random. In the end parameters, optimizer, random state, position in
the data and all records but the speed must be those of the other run, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.run import best_checkpoint, metric_writers

_KILLS = flags.DEFINE_integer("kills", 30, "How often.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_UPDATES = flags.DEFINE_integer("updates", 1500, "Of the run.", lower_bound=1)

_SPEED = ("tokens_per_second", "of_peak", "skipped_since_start")
_SECONDS = 300


def main() -> None:
  rng = random.Random(_SEED.value)
  with tempfile.TemporaryDirectory() as directory:
    peaceful, killed = (pathlib.Path(directory) / name for name in ("peaceful", "killed"))
    _finish(peaceful)
    done = Counter()
    lost = []
    for i in range(_KILLS.value):
      kind = rng.choice(sorted(_MOMENTS))
      moment, before = _MOMENTS[kind](killed, rng), run_directory.latest_step(killed) or 0
      shown = _kill(killed, moment)
      reached = max(
        [
          before,
          *(
            int(line.split()[1].partition("/")[0]) for line in shown if line.startswith("training ")
          ),
        ]
      )
      now = run_directory.latest_step(killed) or 0
      lost.append(max(reached - now, 0))
      done[kind] += 1
      print(f"{i + 1:3d}  killed {kind:<24} whole: step {now}", flush=True)
    _finish(killed)
    _compare(peaceful, killed)
    print(f"\n{'killed':<26}{'times':>6}{'survived':>10}")
    for kind, n in sorted(done.items()):
      print(f"{kind:<26}{n:>6}{n:>10}")
    print(
      f"\nThe run is that of a process never killed, bit for bit, after {sum(done.values())} kills; "
      f"what a kill undid of the updates it had shown: {max(lost)} at most."
    )


def _start(workdir: pathlib.Path) -> subprocess.Popen:
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "experiments.text",
      "--smoke",
      f"--workdir={workdir}",
      "--save_seconds=0.3",
      f"--config.n_max_step={_UPDATES.value}",
      "--validate_every=200",
      "--eval_window=8",
      "--log_every=10",
    ],
    text=True,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )


def _finish(workdir: pathlib.Path) -> None:
  process = _start(workdir)
  _, err = process.communicate(timeout=_SECONDS)
  if process.returncode:
    raise ValueError(f"the run does not end well: {err.strip().splitlines()[-1]}")


def _kill(workdir: pathlib.Path, moment: Callable[[], bool]) -> list[str]:
  """What the process said before it was killed, or had ended."""
  process, deadline = _start(workdir), time.monotonic() + _SECONDS
  while process.poll() is None and not moment() and time.monotonic() < deadline:
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  _, err = process.communicate()
  return err.splitlines()


def _at_random(workdir: pathlib.Path, rng: random.Random) -> Callable[[], bool]:
  end = time.monotonic() + rng.uniform(0.5, 8.0)
  return lambda: time.monotonic() > end


def _in_checkpoint(workdir: pathlib.Path, rng: random.Random) -> Callable[[], bool]:
  """While the k-th checkpoint from now on is written, or the one that validation likes."""
  left, seen = rng.randint(1, 3), set()
  place = workdir / "best" / "checkpoints" if rng.random() < 0.3 else workdir / "checkpoints"

  def moment() -> bool:
    seen.update(path.name for path in place.glob("*tmp*"))
    return len(seen) >= left

  return moment


def _in_evaluation(workdir: pathlib.Path, rng: random.Random) -> Callable[[], bool]:
  """Between the checkpoint that precedes a validation and what it finds."""
  known = best_checkpoint.read_validations(workdir).step
  delay = rng.uniform(0.0, 0.15)
  due = (max(known, 0) // 200 + 1) * 200
  since: list[float] = []

  def moment() -> bool:
    if not since and any(step >= due for step in run_directory.saved_steps(workdir)):
      since.append(time.monotonic())
    return bool(since) and time.monotonic() > since[0] + delay

  return moment


def _in_encoding(workdir: pathlib.Path, rng: random.Random) -> Callable[[], bool]:
  cache = workdir / "cache"
  shutil.rmtree(cache, ignore_errors=True)
  delay = rng.uniform(0.0, 0.02)
  since: list[float] = []

  def moment() -> bool:
    if not since and cache.is_dir() and any(cache.iterdir()):
      since.append(time.monotonic())
    return bool(since) and time.monotonic() > since[0] + delay

  return moment


_MOMENTS = {
  "at random": _at_random,
  "writing a checkpoint": _in_checkpoint,
  "in an evaluation": _in_evaluation,
  "encoding data": _in_encoding,
}


def _compare(peaceful: pathlib.Path, killed: pathlib.Path) -> None:
  want, got = (tvq.load_checkpoint(workdir) for workdir in (peaceful, killed))
  same = jax.tree.map(
    lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()),
    (got.train_state, jax.random.key_data(got.rng), got.data_step),
    (want.train_state, jax.random.key_data(want.rng), want.data_step),
  )
  if not jax.tree.all(same):
    raise ValueError("the parameters or the optimizer are other ones.")
  lines = [
    [
      {name: value for name, value in record.items() if name not in _SPEED}
      for record in metric_writers.read_records(workdir)
    ]
    for workdir in (peaceful, killed)
  ]
  if lines[0] != lines[1]:
    raise ValueError("the records are other ones.")
  if best_checkpoint.read_validations(peaceful) != best_checkpoint.read_validations(killed):
    raise ValueError("another checkpoint is the best.")


if __name__ == "__main__":
  launcher.launch("kills", main)
