"""Several processes, each with some of the devices, that run one program together.

What only one of them may do (files, progress) the first does; what all must do at the same step
(save, stop) they agree on.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

_HEARTBEAT_SECONDS = 20  # until the others learn of a process that no longer answers
_START_SECONDS = 300
_NAME = "hosts"
# A status of XLA's, of those who speak to other processes.
_PEERS = re.compile(r"[A-Z_]+: .*\b(?i:gloo|nccl|coordination service)\b", re.DOTALL)


def initialize(
  coordinator: str | None = None,
  n_process: int | None = None,
  process: int | None = None,
  *,
  seconds: int = _START_SECONDS,
) -> None:
  """Joins the other processes of a run; before anything else asks JAX for devices.

  Args:
    coordinator: HOST:PORT of the first process; None, with the others: the cluster says.
    n_process: how many there are.
    process: which one this is, from 0.
    seconds: how long to wait for all of them.

  Raises:
    ValueError: they did not find together; the message says what was tried.
  """
  given = dict(coordinator=coordinator, n_process=n_process, process=process)
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise ValueError(
      f"{', '.join(given)} must be given together, or none of them: "
      f"{', '.join(missing)} is missing."
    )
  if n_process is not None and not 0 <= process < n_process:
    raise ValueError(f"process={process} must be at least 0 and less than n_process={n_process}.")
  where = "" if coordinator else " No cluster says where: give coordinator, n_process and process."
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
      f"the processes did not find together (coordinator={coordinator}, "
      f"n_process={n_process}, process={process}, within {seconds} s): "
      f"{str(error).splitlines()[0]}{where}"
    ) from error


def is_initialized() -> bool:
  """Whether this process has joined others."""
  return jax.distributed.is_initialized()


def is_single_process() -> bool:
  """Whether this process is the only one."""
  return jax.process_count() == 1


def is_main_process() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def is_peer_failure(error: Exception) -> bool:
  """Whether an error says that another process is gone; JAX has no type of its own for that.

  >>> is_of_another(ValueError("UNKNOWN: Gloo AllGather failed"))  # nobody was joined
  False
  """
  return is_initialized() and (isinstance(error, RuntimeError) or bool(_PEERS.match(str(error))))


def barrier(name: str) -> None:
  """Waits until every process is here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast(value: int) -> int:
  """What the first process says."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


class StopVote:
  """What any process asks for, known to all at the same call.

  Of several processes none waits: a call sends this one's wishes and tells what all wished at the
  call before.

  >>> Votes()(True, False)
  (True, False)
  """

  def __init__(self):
    self._before: Any = None
    if jax.process_count() > 1:
      devices = np.array(jax.devices())
      mesh = jax.sharding.Mesh(devices, (_NAME,), axis_types=(AxisType.Auto,))
      self._rows = NamedSharding(mesh, PartitionSpec(_NAME))
      self._any = jax.jit(
        lambda x: x.max(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())
      )

  def __call__(self, *wishes: object) -> tuple[bool, ...]:
    mine = tuple(bool(wish) for wish in wishes)
    if jax.process_count() == 1:
      return mine
    local = np.tile(np.array(mine, np.int32), (jax.local_device_count(), 1))
    before, self._before = (
      self._before,
      self._any(jax.make_array_from_process_local_data(self._rows, local)),
    )
    return (False,) * len(mine) if before is None else tuple(bool(x) for x in np.asarray(before))

  def forget(self) -> None:
    """What was asked for so far is done."""
    self._before = None


class SharedStopRequest:
  """A request that becomes true for all processes at the same question, if any has it.

  All must ask equally often.
  """

  def __init__(self, request: object):
    self._request, self._votes, self._asked = request, StopVote(), False

  def __bool__(self) -> bool:
    self._asked = self._asked or self._votes(self._request)[0]
    return self._asked
