"""Training with several processes, each of which drives some of the devices.

All processes run the same program. Only process 0 writes files and logs; actions that all
processes must take at the same step, such as saving or stopping, are agreed on here.
"""

from __future__ import annotations

from collections.abc import Iterator
import re

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from tvq_haiku.types import Array, StopRequest

_HEARTBEAT_SECONDS = 20  # a process that is silent for this long counts as dead
_START_SECONDS = 300  # timeout for the processes to find each other
_PROCESS_AXIS = "process"  # the mesh axis over which votes are reduced

# JAX has no exception type for the failure of another process, so it is recognized by its message,
# which begins with an XLA status and names the layer that communicates with other processes. The
# patterns are longer than a single word such as "gloo", so that file paths do not match.
_PEER_FAILURE = re.compile(
  r"[A-Z_]+: .*(?:"
  r"\bGloo [\w -]+ failed"  # collectives on CPUs
  r"|\bNCCL operation .* failed"  # collectives on GPUs
  r"|(?i:coordination ?service)"  # JAX's coordination service, and its RPCs
  r"|\bBarrier (?:timed out|failed)"
  r")",
  re.DOTALL,
)
# Errors of this process alone, even if a collective operation reports them.
_OWN_FAILURE = re.compile(
  r"RESOURCE_EXHAUSTED"
  r"|[Oo]ut of memory"
  r"|NCCL operation .* failed: (?:unhandled cuda error|invalid)",
  re.DOTALL,
)


def initialize(
  coordinator: str | None = None,
  n_process: int | None = None,
  process: int | None = None,
  *,
  seconds: int = _START_SECONDS,
) -> None:
  """Connects this process to the other processes of the run.

  Must be called before JAX initializes its devices. Without the first three arguments, the cluster
  environment (Slurm, Open MPI, a cloud TPU, ...) provides their values.

  Args:
    coordinator: HOST:PORT of process 0.
    n_process: number of processes.
    process: index of this process, 0 <= process < n_process.
    seconds: timeout for all processes to connect.

  Raises:
    ValueError: only some of the first three arguments are given, `process` is out of range, or the
      processes did not connect within the timeout.
  """
  given = dict(coordinator=coordinator, n_process=n_process, process=process)
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise ValueError(
      f"{', '.join(given)} must be given together or not at all: {', '.join(missing)} is missing."
    )
  if n_process is not None and not 0 <= process < n_process:
    raise ValueError(f"process={process} must be at least 0 and less than n_process={n_process}.")
  hint = (
    ""
    if coordinator
    else " No cluster environment was detected: pass coordinator, n_process and process."
  )
  try:
    jax.distributed.initialize(
      coordinator,
      n_process,
      process,
      initialization_timeout=seconds,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f"the processes of this run did not connect (coordinator={coordinator}, "
      f"n_process={n_process}, process={process}, timeout {seconds} s): "
      f"{str(error).splitlines()[0]}{hint}"
    ) from error


def is_initialized() -> bool:
  """Returns whether `initialize` has connected this process to others."""
  return jax.distributed.is_initialized()


def is_single_process() -> bool:
  """Returns whether this is the only process of the run."""
  return jax.process_count() == 1


def is_main_process() -> bool:
  """Returns whether this is process 0, the one that writes files and logs."""
  return jax.process_index() == 0


def is_peer_failure(error: BaseException) -> bool:
  """Returns whether `error` reports that another process failed or cannot be reached.

  The errors that caused `error` are examined, too, because orbax wraps a failed barrier in a
  TimeoutError. Returns False if one of them is a failure of this process itself, such as running
  out of memory.

  >>> is_peer_failure(ValueError("UNKNOWN: Gloo AllGather failed"))  # only one process
  False
  """
  if not is_initialized():
    return False
  messages = [str(cause) for cause in _causes(error)]
  return any(map(_PEER_FAILURE.match, messages)) and not any(map(_OWN_FAILURE.search, messages))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  """Yields `error`, the error that it was raised from or while handling, and so on."""
  while error is not None:
    yield error
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def barrier(name: str) -> None:
  """Blocks until all processes have called `barrier` with the same name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(value: int) -> int:
  """Returns the value that process 0 passed, in int32. All processes must call this."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


class StopVote:
  """Combines the requests of all processes: a request is True if any process has made it.

  With several processes a call never waits for the others. It starts a reduction over the
  requests of all processes and returns the result of the previous call's reduction, so all
  processes learn of a request in the same call. All processes must call it equally often.

  >>> StopVote()(True, False)  # a single process gets its own requests back at once
  (True, False)
  """

  def __init__(self):
    self._previous: Array | None = None  # [n_request] int32, the result of the previous call
    if jax.process_count() > 1:
      devices = np.array(jax.devices())
      mesh = jax.sharding.Mesh(devices, (_PROCESS_AXIS,), axis_types=(AxisType.Auto,))
      self._per_device = NamedSharding(mesh, PartitionSpec(_PROCESS_AXIS))
      self._any = jax.jit(
        lambda votes: votes.max(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())
      )

  def __call__(self, *requests: StopRequest) -> tuple[bool, ...]:
    """Returns, for each request, whether any process made it in the previous call."""
    own = tuple(bool(request) for request in requests)
    if jax.process_count() == 1:
      return own
    local = np.tile(np.array(own, np.int32), (jax.local_device_count(), 1))
    votes = jax.make_array_from_process_local_data(self._per_device, local)
    previous, self._previous = self._previous, self._any(votes)
    if previous is None:
      return (False,) * len(own)
    return tuple(bool(request) for request in np.asarray(previous))

  def forget(self) -> None:
    """Discards the requests of the previous call, because they have been carried out."""
    self._previous = None


class SharedStopRequest:
  """A stop request that becomes true for all processes in the same check, if any process makes it.

  All processes must check it (with `bool`) equally often.
  """

  def __init__(self, request: StopRequest):
    self._request, self._vote, self._stopped = request, StopVote(), False

  def __bool__(self) -> bool:
    self._stopped = self._stopped or self._vote(self._request)[0]
    return self._stopped
