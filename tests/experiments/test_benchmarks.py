"""The benchmarks, with tiny models, as a user starts them."""

import json
import re

import numpy as np
import pytest

from launching import assert_fails_in_one_line, run, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow


def test_compile_time_is_printed_relative_to_the_first_depth(workspace):
  command = "python -m experiments.benchmarks.compile_time --smoke --depths=1,2"
  status, out, err = run(command, workspace)
  assert status == 0, err
  title, *rows = out.splitlines()
  assert title.split() == ["layers", "seconds", "times", "the", "first"]
  (depth_1, seconds_1, ratio_1), (depth_2, seconds_2, ratio_2) = (row.split() for row in rows)
  assert (depth_1, depth_2) == ("1", "2")
  assert float(ratio_1) == 1.0
  np.testing.assert_allclose(float(ratio_2), float(seconds_2) / float(seconds_1), atol=0.03)


def test_decode_reports_the_fraction_of_its_bound(workspace):
  command = "python -m experiments.benchmarks.decode --smoke --batches=2 --positions=100"
  status, out, err = run(f"{command} --json=decode.json", workspace)
  assert status == 0 and len(out.splitlines()) == 3 and "of bound" in out, err
  rows = json.loads((workspace / "decode.json").read_text())["rows"]
  assert [row["position"] for row in rows] == [8, 100]
  row = rows[0]
  np.testing.assert_allclose(row["of_bound"], row["bound_seconds"] / row["seconds_per_step"])
  reading = (
    row["weight_mbytes"] / row["weight_gbytes_per_second"]
    + row["state_mbytes"] / row["state_gbytes_per_second"]
  ) / 1e3
  # Writing one entry of each array takes at most a tenth of the time to read everything.
  assert reading < row["bound_seconds"] < 1.1 * reading


@pytest.mark.parametrize(
  "command, n_row",
  [
    ("train_step --smoke --full --peer=dense --json=rows.json", 3),
    ("attention --smoke --reductions=scan --json=rows.json", 3),
  ],
)
def test_benchmark_prints_a_table_and_writes_it(workspace, command, n_row):
  status, out, err = run(f"python -m experiments.benchmarks.{command}", workspace)
  assert status == 0, err
  table = [line for line in out.splitlines() if re.match(r" *(32|64) ", line)]
  assert len(table) == n_row and "of peak" in out
  content = json.loads((workspace / "rows.json").read_text())
  assert content["machine"]["backend"] == "cpu"
  assert len(content["rows"]) == n_row
  for row in content["rows"]:
    assert row["tokens_per_second"] > 0 and row["temp_mbytes"] > 0 and row["compile_seconds"] > 0
    np.testing.assert_allclose(
      row["of_peak"], row["model_flops"] / row["seconds"] / row["peak_gflops"] / 1e9
    )


@pytest.mark.parametrize(
  "command, message",
  [
    ("train_step --seq_lens=2k", "--seq_lens: '2k' must be an integer of at least 1"),
    ("train_step --head_types=gqa", "head_type='gqa': must be one of"),
    ("train_step --json=README.md/rows.json", "README.md"),
    ("attention --reductions=sum --smoke", "reduction='sum' must be one of"),
    ("compile_time --depths=0", "n_layer=0: must be at least 1"),
  ],
)
def test_wrong_input_is_reported_in_one_line(workspace, command, message):
  assert_fails_in_one_line(f"benchmarks.{command}", workspace, 1, message)
