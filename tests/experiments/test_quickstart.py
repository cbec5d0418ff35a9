"""The quickstart, as a user starts it."""

import re
import shutil
import signal

import pytest

import tvq_haiku as tvq
from tvq_haiku.run import metric_writers

import helpers
from launching import assert_fails_in_one_line, run, start, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow

COMMAND = "python -m experiments.quickstart --smoke --workdir=runs/quickstart"


def test_report_compares_the_model_with_compressors_and_shows_samples(quickstart):
  out, err = quickstart
  assert re.search(
    r"tvq_haiku +\d\.\d{3}\n +gzip -9 +\d\.\d{3}\n +bzip2 -9 +\d\.\d{3}\n +xz -9e +\d\.\d{3}\n", out
  )
  assert out.count("\n  [") == 3  # samples
  assert "python -m experiments.sample --workdir=runs/quickstart" in out
  assert re.search(r"training \d+/\d+  \d\.\d{3} bits per token  [\d,]+ tokens/s  \d+ s left", err)
  assert "Traceback" not in err and "checkpoint_manager" not in err


def test_learning_curve_is_recorded(quickstart, workspace):
  records = metric_writers.read_records(workspace / "runs" / "quickstart")
  assert [record["step"] for record in records] == [10, 20]
  assert all(0 < record["loss_lm"] < 9 for record in records)


def test_parameters_are_exported(quickstart, workspace):
  status, out, err = run(f"{COMMAND} --command=export", workspace)
  assert (status, err) == (0, "")
  assert out == "Wrote the parameters after 20 updates to runs/quickstart/params.safetensors\n"
  params, config = tvq.import_params(workspace / "runs" / "quickstart" / "params.safetensors")
  run_params = tvq.load_checkpoint(workspace / "runs" / "quickstart").train_state.params
  assert config.n_vocab == 259
  helpers.assert_same(params, run_params)


def test_complete_run_prints_its_report_again(quickstart, workspace):
  status, out, err = run(COMMAND, workspace)
  assert status == 0, err
  assert out.startswith(quickstart[0])
  assert "This run is complete." in out and "--smoke --seed=1 --workdir=DIRECTORY" in out


def test_interrupted_run_is_saved_and_names_the_command_that_resumes_it(workspace):
  command = "python -m experiments.quickstart --smoke --seed=3 '--workdir=a run'"
  process = start(command, workspace)
  while "training" not in process.stderr.readline():
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  resume = re.search(r"Stopped after (\d+) of 20 updates and saved\. To resume: (.*)\n", out)
  assert resume[2] == command
  assert (workspace / "a run" / "checkpoints" / resume[1]).is_dir()


def test_damaged_checkpoint_is_reported_in_one_line(quickstart, workspace):
  shutil.copytree(workspace / "runs" / "quickstart", workspace / "damaged")
  files = [path for path in (workspace / "damaged" / "checkpoints").rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:1000])
  for command in ("sample --workdir=damaged", "quickstart --smoke --workdir=damaged"):
    assert_fails_in_one_line(command, workspace, 1, "damaged or incomplete")


def test_different_seed_is_refused(quickstart, workspace):
  command = "quickstart --smoke --workdir=runs/quickstart --seed=5"
  assert_fails_in_one_line(command, workspace, 1, "seed mismatch")


def test_different_configuration_is_refused(quickstart, workspace):
  shutil.copytree(workspace / "runs" / "quickstart", workspace / "different")
  config = workspace / "different" / "config.json"
  text = config.read_text()
  assert '"n_code": 16' in text
  config.write_text(text.replace('"n_code": 16', '"n_code": 17'))
  command = "quickstart --smoke --workdir=different"
  assert_fails_in_one_line(command, workspace, 1, "n_code is 17 in the run, 16 here")


@pytest.mark.parametrize(
  "command, status, message",
  [
    ("quickstart --stepz=3", 2, "Unknown command line flag 'stepz'"),
    ("quickstart --seed=-1", 2, "seed"),
    ("quickstart now", 2, "unexpected argument 'now'"),
    ("quickstart --smoke --workdir=README.md/run", 1, "cannot write to the directory"),
  ],
)
def test_wrong_input_is_reported_in_one_line_and_creates_no_files(
  workspace, command, status, message
):
  before = sorted(workspace.rglob("*"))
  assert_fails_in_one_line(command, workspace, status, message)
  assert sorted(workspace.rglob("*")) == before
