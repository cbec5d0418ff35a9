"""The scripts of `experiments/reliability`, with short runs."""

import re

import pytest

from launching import run, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow


def test_killed_run_equals_an_uninterrupted_one(workspace):
  command = "python -m experiments.reliability.kill_and_resume --kills=2 --updates=40 --seed=1"
  status, out, err = run(command, workspace)
  assert status == 0, err
  lines = out.splitlines()
  assert [line.split()[0] for line in lines[:2]] == ["1", "2"]
  table = [re.fullmatch(r"(.+?) {2,}(\d+) +(\d+)", line) for line in lines[4:-2]]
  assert sum(int(row[2]) for row in table) == 2 and all(row[2] == row[3] for row in table)
  assert "After 2 kills, the run is bitwise equal to the uninterrupted run" in lines[-1]


def test_memory_growth_prints_memory_and_slope(workspace):
  command = "python -m experiments.reliability.memory_growth --updates=100"
  status, out, err = run(command, workspace)
  assert status == 0, err
  *rows, slope = out.splitlines()
  rows = [re.fullmatch(r"update +(\d+) +([\d.]+) MB", row) for row in rows]
  steps, megabytes = [int(row[1]) for row in rows], [float(row[2]) for row in rows]
  assert len(rows) >= 10 and steps == sorted(steps) and steps[-1] <= 100
  assert all(100 < memory < 10_000 for memory in megabytes)
  assert re.fullmatch(r"slope over the second half: -?[\d.]+ MB per 1,000 updates", slope)
