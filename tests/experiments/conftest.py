"""Small runs that the tests of several commands share."""

import shutil

import pytest

from experiments import open_run

from launching import make_workspace, run
import small_experiments


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory):
  """Runs the quickstart; returns the directory where it was started, its output and messages."""
  directory = make_workspace(tmp_path_factory.mktemp("quickstart"))
  command = "python -m experiments.quickstart --smoke --workdir=runs/quickstart"
  status, out, err = run(command, directory)
  assert status == 0, err
  return directory, out, err


@pytest.fixture(scope="module")
def quickstart(quickstart_run, workspace):
  """Copies the run to runs/quickstart in the workspace; returns its output and its messages."""
  directory, out, err = quickstart_run
  shutil.copytree(directory / "runs", workspace / "runs")
  return out, err


@pytest.fixture(scope="session")
def saved_runs(tmp_path_factory):
  """A run of each kind of experiment, with random parameters."""
  directory = tmp_path_factory.mktemp("saved-runs")
  return {
    kind: open_run.open_run(small_experiments.save_run(directory / kind, kind), weights="best")
    for kind in small_experiments.KINDS
  }
