"""Several processes on one machine train together as one does, and notice when one of them dies."""

import signal
import socket
import time

import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import checkpoints
from tvq_haiku.parallel import multihost
from tvq_haiku.run import best_checkpoint, metric_writers

import helpers
from launching import place, run, start

assert place  # a fixture

COMMAND = "python -m experiments.text --smoke --validate_every=10 --log_every=1"


def together(n, place, workdir, flags=""):
  """Starts n processes of a run."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  return [
    start(
      f"{COMMAND} --workdir={workdir} --multihost --coordinator=localhost:{port} --n_process={n} "
      f"--process={i} {flags}",
      place,
    )
    for i in range(n)
  ]


def ended(processes, timeout=120):
  return [(*process.communicate(timeout=timeout), process.returncode) for process in processes]


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory):
  """The run of one process."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  status, _, err = run(f"{COMMAND} --workdir={workdir}", place)
  assert status == 0, err
  return workdir


def assert_same_run(workdir, want):
  lines = [metric_writers.read_records(directory) for directory in (workdir, want)]
  for ours, theirs in zip(*lines, strict=True):
    for name in ("loss_lm", "grad_norm", "validation_loss_lm", "code_perplexity"):
      if name in ours:
        np.testing.assert_allclose(
          ours[name], theirs[name], rtol=1e-5, err_msg=f"{name}, {ours['step']}"
        )
  params = [tvq.load_checkpoint(directory).train_state.params for directory in (workdir, want)]
  helpers.assert_trees_close(*params, atol=2e-4)
  assert best_checkpoint.read_validations(workdir)[:2] == best_checkpoint.read_validations(want)[:2]


@pytest.mark.parametrize("n, mesh", [(2, ""), (4, "--mesh=fsdp:2,model:2")])
def test_several_processes_are_one(n, mesh, alone, place, tmp_path):
  results = ended(together(n, place, tmp_path / "run", mesh))
  assert [status for *_, status in results] == [0] * n, results
  assert "Trained: 20 updates" in results[0][0]
  assert not any("Trained" in out for out, *_ in results[1:])  # one of them speaks
  assert all("training" not in err for _, err, _ in results[1:])
  assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("victim", [1, 0])
def test_one_is_killed_the_other_stops_and_the_run_goes_on(victim, alone, place, tmp_path):
  workdir = tmp_path / "run"
  processes = together(2, place, workdir, "--save_seconds=0.0")
  deadline = time.monotonic() + 120
  while not checkpoints.saved_steps(workdir) and time.monotonic() < deadline:
    time.sleep(0.01)
  processes[victim].kill()
  begin = time.monotonic()
  results = ended(processes)
  assert time.monotonic() - begin < 60
  _, err, status = results[1 - victim]
  assert status in (1, -signal.SIGABRT), err  # the latter is JAX's, if it learns of it first
  if status == 1:
    assert "stopped, because another process of this run did" in err and "Traceback" not in err, err
  else:
    assert "another task died" in err, err
  status, out, err = run(f"{COMMAND} --workdir={workdir}", place)  # with one process less
  assert status == 0 and "Trained: 20 updates" in out and "going on after" in err, err
  assert_same_run(workdir, alone)


def test_a_signal_to_one_of_them_stops_all_at_the_same_step(alone, place, tmp_path):
  workdir = tmp_path / "run"
  flags = "--config.n_max_step=4000 --config.n_warmup_step=5"
  processes = together(2, place, workdir, f"--save_seconds=0.0 {flags}")
  while not checkpoints.saved_steps(workdir):
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGTERM)
  results = ended(processes)
  assert [status for *_, status in results] == [0, 0], results
  assert "updates and saved. To go on: python -m experiments.text" in results[0][0]


@pytest.mark.parametrize(
  "flags, message",
  [
    ("--multihost --n_process=2", "coordinator, process is missing"),
    (
      "--multihost --coordinator=localhost:1 --n_process=2 --process=2",
      "process=2 must be at least 0",
    ),
    ("--process=1", "--coordinator, --n_process and --process need --multihost"),
    ("--mesh=data:2 --command=test", "--mesh and --multihost are for training"),
    ("--mesh=data:64", "is for 64 devices, and there are"),
  ],
)
def test_bad_flags(flags, message, place, tmp_path):
  status, _, err = run(f"{COMMAND} --workdir={tmp_path / 'run'} {flags}", place)
  assert status in (1, 2) and message in err and "Traceback" not in err


def test_wishes_of_one_process_are_known_at_once():
  votes = multihost.StopVote()
  assert votes(True, False) == (True, False)
  assert not multihost.SharedStopRequest(False) and multihost.SharedStopRequest(True)
  assert (
    multihost.broadcast(3) == 3 and multihost.is_main_process() and not multihost.is_initialized()
  )


def test_whose_fault_it_is(monkeypatch):
  broken = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
  assert not multihost.is_peer_failure(broken)
  monkeypatch.setattr(multihost, "is_initialized", lambda: True)
  assert multihost.is_peer_failure(broken) and multihost.is_peer_failure(RuntimeError("any"))
  assert not multihost.is_peer_failure(ValueError("RESOURCE_EXHAUSTED: No space left on device"))
  assert not multihost.is_peer_failure(ValueError("/data/gloo/train.txt is empty"))
