"""Several processes on one machine train as one process does, and notice when one of them dies."""

import json
import re
import shlex
import signal
import socket
import time

import jax
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.parallel import multihost
from tvq_haiku.run import best_checkpoint, metric_writers

import helpers
from launching import run, start, workspace

pytestmark = pytest.mark.slow

assert workspace  # a fixture

# With one attention per layer, each process compiles in half the time.
COMMAND = (
  "python -m experiments.text --smoke --validate_every=10 --log_every=1 --config.head_type=mqa"
)

# Checks the functions of `multihost` with two processes. Then process 1 runs out of memory.
PRIMITIVES = """
import json
import jax.numpy as jnp
from experiments import launcher
from tvq_haiku.parallel import multihost

def main(argument):
  address, process = argument.split("/")
  first, second = process == "0", process == "1"
  multihost.initialize(address, 2, int(process))
  vote, shared = multihost.StopVote(), multihost.SharedStopRequest(second)
  results = dict(
    state=[multihost.is_initialized(), multihost.is_single_process(), multihost.is_main_process()],
    broadcast=multihost.broadcast(3 if first else 4),
    votes=[vote(second, False), vote(False, False), vote(False, first), vote(False, False)],
    shared=[bool(shared) for _ in range(3)],
  )
  vote(True, True)
  vote.forget()
  results["forgotten"] = vote(False, False)
  multihost.barrier("ready")
  print(json.dumps(results), flush=True)
  if second:
    jnp.zeros((2**45,), jnp.float32).block_until_ready()
  multihost.barrier("end")

launcher.launch("primitives", main, argument="HOST:PORT/PROCESS")
"""


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def start_run(n, workspace, workdir, flags=""):
  """Starts one training run with n processes."""
  port = free_port()
  return [
    start(
      f"{COMMAND} --workdir={workdir} --multihost --coordinator=localhost:{port} --n_process={n} "
      f"--process={i} {flags}",
      workspace,
    )
    for i in range(n)
  ]


def wait_for(processes, timeout=120):
  """Returns (stdout, stderr, exit status) of each process."""
  results = []
  for process in processes:
    out, err = process.communicate(timeout=timeout)
    lines = [line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]")]
    results.append(("".join(lines), err, process.returncode))
  return results


def wait_for_checkpoint(workdir):
  deadline = time.monotonic() + 120
  while not run_directory.saved_steps(workdir):
    assert time.monotonic() < deadline, "no checkpoint was saved"
    time.sleep(0.01)


@pytest.fixture(scope="module")
def single_process_run(workspace, tmp_path_factory):
  """Returns the directory of a finished run with one process."""
  workdir = tmp_path_factory.mktemp("single") / "run"
  status, _, err = run(f"{COMMAND} --workdir={workdir}", workspace)
  assert status == 0, err
  return workdir


def assert_same_run(workdir, want):
  records = [metric_writers.read_records(directory) for directory in (workdir, want)]
  assert len(records[1]) > 0
  for ours, theirs in zip(*records, strict=True):
    assert ours["step"] == theirs["step"]
    for name in ("loss_lm", "grad_norm", "validation_loss_lm", "code_perplexity"):
      assert (name in ours) == (name in theirs), f"{name}, step {ours['step']}"
      if name in ours:
        np.testing.assert_allclose(
          ours[name], theirs[name], rtol=1e-5, err_msg=f"{name}, step {ours['step']}"
        )
  params = [tvq.load_checkpoint(directory).train_state.params for directory in (workdir, want)]
  helpers.assert_trees_close(*params, atol=2e-4)
  assert best_checkpoint.read_validations(workdir)[:2] == best_checkpoint.read_validations(want)[:2]


@pytest.mark.parametrize("n, mesh", [(2, ""), (4, "--mesh=fsdp:2,model:2")])
def test_several_processes_train_as_one_does(n, mesh, single_process_run, workspace, tmp_path):
  results = wait_for(start_run(n, workspace, tmp_path / "run", mesh))
  assert [status for *_, status in results] == [0] * n, results
  assert "Trained for 20 updates" in results[0][0]
  for out, err, _ in results[1:]:  # only process 0 logs
    assert out == "" and "training" not in err
  assert_same_run(tmp_path / "run", single_process_run)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_stops_the_others_and_the_run_resumes(
  victim, single_process_run, workspace, tmp_path
):
  workdir = tmp_path / "run"
  processes = start_run(2, workspace, workdir, "--save_seconds=0.0")
  wait_for_checkpoint(workdir)
  processes[victim].kill()
  results = wait_for(processes, timeout=60)  # the survivor must not hang
  assert results[victim][2] == -signal.SIGKILL
  out, err, status = results[1 - victim]
  assert "Trained" not in out
  if status == -signal.SIGABRT:  # JAX noticed first and aborted the process
    assert "another task died" in err, err
  else:
    assert status == 1, err
    assert "stopped, because another process of this run stopped" in err, err
    assert "Traceback" not in err, err

  saved = run_directory.saved_steps(workdir)[-1]
  assert 0 < saved < 20
  status, out, err = run(f"{COMMAND} --workdir={workdir}", workspace)  # with a single process
  assert status == 0 and "Trained for 20 updates" in out, err
  assert f"resuming after {saved} of 20 updates" in err, err
  assert_same_run(workdir, single_process_run)


def test_a_signal_to_one_process_stops_all_at_the_same_step(workspace, tmp_path):
  workdir = tmp_path / "run"
  flags = "--config.n_max_step=4000 --config.n_warmup_step=5"
  processes = start_run(2, workspace, workdir, f"--save_seconds=0.0 {flags}")
  wait_for_checkpoint(workdir)
  processes[1].send_signal(signal.SIGTERM)
  results = wait_for(processes)
  assert [status for *_, status in results] == [0, 0], results
  out = results[0][0]
  stopped = int(re.search(r"Stopped after (\d+) of 4000 updates", out)[1])
  assert "python -m experiments.text" in out  # the command that resumes the run
  assert results[1][0] == ""
  assert 0 < stopped < 4000 and run_directory.saved_steps(workdir)[-1] == stopped
  assert int(tvq.load_checkpoint(workdir).train_state.step) == stopped


def test_votes_broadcasts_and_the_failure_of_one_process(workspace):
  address = f"localhost:{free_port()}"
  command = f"python -c {shlex.quote(PRIMITIVES)} {address}"
  results = wait_for([start(f"{command}/{process}", workspace) for process in range(2)])
  for process, (out, err, _) in enumerate(results):
    assert out, err
    assert json.loads(out) == {
      "state": [True, False, process == 0],
      "broadcast": 3,
      "votes": [[False, False], [True, False], [False, False], [False, True]],
      "shared": [False, True, True],
      "forgotten": [False, False],
    }
  # Process 1 reports its own failure and does not wait for process 0, which reports that another
  # process stopped.
  assert [status for *_, status in results] == [1, 1], results
  peer, own = results[0][1], results[1][1]
  assert "RESOURCE_EXHAUSTED" in own and "another process" not in own, own
  assert "stopped, because another process of this run stopped" in peer, peer


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
    ("--mesh=data:64", "mesh='data:64'"),
  ],
)
def test_wrong_flags_are_reported_in_one_line(flags, message, workspace, tmp_path):
  status, _, err = run(f"{COMMAND} --workdir={tmp_path / 'run'} {flags}", workspace)
  assert status in (1, 2) and message in err and "Traceback" not in err


def test_a_single_process_gets_its_own_requests_at_once():
  vote = multihost.StopVote()
  assert vote(True, False) == (True, False)
  assert vote(False, False) == (False, False)
  assert not multihost.SharedStopRequest(False)
  assert multihost.SharedStopRequest(True)
  assert multihost.broadcast(3) == 3
  assert multihost.is_main_process() and multihost.is_single_process()
  assert not multihost.is_initialized()


def test_a_shared_stop_request_stays_true():
  request = [True]  # true until it is cleared
  shared = multihost.SharedStopRequest(request)
  assert shared
  request.clear()
  assert shared


PEER = [
  # Messages of jaxlib when a process was killed during or before an operation of the others.
  "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection "
  "closed by peer [127.0.0.1]:9647",
  "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error "
  "[127.0.0.1]:390: Connection reset by peer",
  "UNKNOWN: Gloo context initialization failed: Connect timeout",
  "INTERNAL: Error dispatching computation: UNKNOWN: Gloo collective permute failed: timeout",
  "DEADLINE_EXCEEDED: Barrier timed out. Id: b1::0. This usually happens because a task triggered "
  "the barrier too early or too slowly.\n# of tasks that reached the barrier: 1/2.",
  "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/"
  'died/restarted unexpectedly ... {grpc_status:14, grpc_message:"Socket closed"}',
  "DEADLINE_EXCEEDED: GetKeyValue() timed out with key: cpu:gloo/0 and duration: 3s "
  "[type.googleapis.com/tensorflow.CoordinationServiceError='']",
  "INTERNAL: external/xla/xla/service/gpu/nccl_utils.cc:305: NCCL operation ncclAllReduce(a, b) "
  "failed: remote process exited or there was a network error.",
]
OWN = [
  "RESOURCE_EXHAUSTED: Out of memory allocating 140737488355328 bytes.",
  "RESOURCE_EXHAUSTED: No space left on device",
  "INTERNAL: NCCL operation ncclCommInitRank(&comm, nranks, id, rank) failed: unhandled cuda error "
  "(run with NCCL_DEBUG=INFO for details). Last NCCL warning(error) log entry (may be unrelated) "
  "'Cuda failure 2 'out of memory''.",
  "INTERNAL: NCCL operation ncclCommInitRank(&comm, nranks, id, rank) failed: unhandled cuda error",
  "INVALID_ARGUMENT: Buffer has been deleted or donated.",
  "NOT_FOUND: Error opening file /data/gloo/nccl/train.bin",
  "/data/gloo/train.txt is empty",
  "the training step was compiled again at update 7",
  "[Errno 104] Connection reset by peer",
]


class TestPeerFailure:
  """`is_peer_failure` recognizes errors that the failure of another process caused."""

  @pytest.fixture(autouse=True)
  def several_processes(self, monkeypatch):
    monkeypatch.setattr(multihost, "is_initialized", lambda: True)

  @pytest.mark.parametrize("kind", [ValueError, RuntimeError, jax.errors.JaxRuntimeError])
  @pytest.mark.parametrize(
    "message, expected", [*((m, True) for m in PEER), *((m, False) for m in OWN)]
  )
  def test_message(self, kind, message, expected):
    assert multihost.is_peer_failure(kind(message)) == expected

  def test_a_single_process_has_no_peers(self, monkeypatch):
    monkeypatch.setattr(multihost, "is_initialized", lambda: False)
    assert not any(multihost.is_peer_failure(RuntimeError(message)) for message in PEER)

  def test_the_cause_of_an_error_counts(self):
    """Orbax raises a TimeoutError from the error of its barrier."""
    wrapped = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    assert not multihost.is_peer_failure(wrapped)
    wrapped.__cause__ = RuntimeError(PEER[4])
    assert multihost.is_peer_failure(wrapped)

  @pytest.mark.parametrize("own_is_first", [True, False])
  def test_running_out_of_memory_is_the_failure_of_this_process(self, own_is_first):
    """The failure of a barrier before or after it does not matter."""
    first, second = (OWN[0], PEER[4]) if own_is_first else (PEER[4], OWN[0])
    error = RuntimeError(second)
    error.__context__ = RuntimeError(first)
    assert not multihost.is_peer_failure(error)
