"""The content of a checkpoint, and loading a checkpoint from the directory of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import os
import pathlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.checkpoint import run_directory
from tvq_haiku.checkpoint.run_directory import CheckpointError
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.model import parameters
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.training import train_step as train_step_lib
from tvq_haiku.types import Array, ArrayTree
from tvq_haiku.utils import files, optional, progress

_ORBAX_ITEM = "default"  # the subdirectory in which orbax puts the arrays of a checkpoint


class Checkpoint(NamedTuple):
  """Everything that is needed to resume a run."""

  config: TransformerConfig
  train_cfg: TrainConfig
  train_state: train_step_lib.TrainState  # parameters, optimizer state and number of updates
  rng: Array  # [] typed PRNG key from which the key of every batch is derived
  data_step: int  # number of training batches read


def load_checkpoint(
  directory: str | os.PathLike, step: int | None = None, *, mesh: jax.sharding.Mesh | None = None
) -> Checkpoint:
  """Loads a checkpoint and its configurations from the directory of a run.

  Args:
    directory: directory of the run.
    step: number of updates at which the checkpoint was saved. None: the newest intact
      checkpoint; a warning on standard error names each newer one that is damaged.
    mesh: mesh on which to place the arrays; it may differ from the mesh of the run. None: the first
      device.

  Returns:
    The checkpoint, with its arrays on the devices.

  Raises:
    CheckpointError: there is no such checkpoint, or it is damaged.
  """
  path = pathlib.Path(directory).absolute()
  load = functools.partial(
    _load,
    abstract=_abstract_checkpoint(*run_directory.load_config(path), mesh),
    rng_impl=run_directory.load_rng_impl(path),
  )
  steps = run_directory.saved_steps(path)
  if not steps:
    raise CheckpointError(
      f"{path} holds no checkpoint: {run_directory.STEPS_DIRECTORY}/ is empty or missing."
    )
  if step is not None:
    if step not in steps:
      raise CheckpointError(
        f"{path} holds no checkpoint of update {step}; it holds those of updates "
        f"{', '.join(map(str, steps))}."
      )
    return load(run_directory.step_directory(path, step))
  checkpoint = _load_newest(path, steps, load)
  if checkpoint is None:  # a training process has replaced all of them in the meantime
    return load_checkpoint(path, mesh=mesh)
  return checkpoint


def load_run(
  directory: str | os.PathLike,
  *,
  weights: str = "best",
  changes: Mapping[str, Any] | None = None,
) -> Checkpoint:
  """Loads the best checkpoint of a run, or its newest one.

  Args:
    directory: directory of the run.
    weights: "best": the checkpoint with the lowest validation loss, or the newest one if no
      validation was made; "last": the newest one.
    changes: fields of the model configuration to change, such as `precision`.

  Returns:
    The checkpoint, with the changed configuration.

  Raises:
    CheckpointError: there is no checkpoint, or it is damaged.
    ValueError: `weights` has another value, or the changed configuration needs parameters of
      different shapes.
  """
  if weights not in ("best", "last"):
    raise ValueError(f"weights={weights!r} must be 'best' or 'last'.")
  best = pathlib.Path(directory) / run_directory.BEST_DIRECTORY
  if weights == "best" and run_directory.has_checkpoint(best):
    try:
      checkpoint = load_checkpoint(best)
    except CheckpointError as error:
      raise CheckpointError(
        f"{error} Load the newest checkpoint with weights='last' (--weights=last) instead."
      ) from error
  else:
    checkpoint = load_checkpoint(directory)
  config = checkpoint.config.replace(**(changes or {}))
  parameters.check_params(checkpoint.train_state.params, config)
  return checkpoint._replace(config=config)


def _load_newest(
  path: pathlib.Path, steps: list[int], load: Callable[[pathlib.Path], Checkpoint]
) -> Checkpoint | None:
  """Loads the newest intact checkpoint.

  Args:
    path: directory of the run.
    steps: numbers of updates of its checkpoints, in ascending order.
    load: loads the checkpoint in a directory.

  Returns:
    The checkpoint, or None if none of the checkpoints exists any longer.

  Raises:
    CheckpointError: all checkpoints that still exist are damaged.
  """
  problems: list[str] = []  # one for each damaged checkpoint, newest first
  for step in reversed(steps):
    directory = run_directory.step_directory(path, step)
    try:
      checkpoint = load(directory)
    except CheckpointError as error:
      if directory.exists():  # otherwise a training process has removed it
        problems.append(str(error))
      continue
    if multihost.is_main_process():
      for problem in problems:
        progress.log(f"warning: {problem} Loading the checkpoint of update {step} instead.")
    return checkpoint
  if not problems:
    return None
  message = problems[0]
  if len(problems) > 1:
    message += " No older checkpoint can be loaded either."
  best = path / run_directory.BEST_DIRECTORY
  if run_directory.has_checkpoint(best):
    message += (
      f" {best} may still be intact: export its parameters and initialize a new run from them."
    )
  raise CheckpointError(message)


def _load(directory: pathlib.Path, abstract: Checkpoint, rng_impl: str | None) -> Checkpoint:
  """Verifies and loads one checkpoint.

  Args:
    directory: directory of the checkpoint.
    abstract: the configurations, and the shapes, dtypes and shardings of the arrays to load.
    rng_impl: kind of the run's random keys; None: it is not recorded.

  Raises:
    CheckpointError: the checkpoint is damaged or incomplete.
  """
  _verify(directory)
  try:
    with orbax().StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(directory / _ORBAX_ITEM, to_tree(abstract))
    rng = _wrap_key(np.asarray(tree["rng"]), rng_impl)
  except Exception as error:  # orbax and tensorstore raise many types of exceptions
    if multihost.is_peer_failure(error):
      raise
    reason = files.short_message(error).rstrip(".")
    raise CheckpointError(f"{directory} is damaged or incomplete: {reason}.") from error
  return abstract._replace(
    train_state=train_step_lib.TrainState(tree["params"], tree["opt_state"], tree["step"]),
    rng=rng,
    data_step=int(tree["data_step"]),
  )


def _wrap_key(data: np.ndarray, impl: str | None) -> Array:
  """Returns the random key with this data; its kind need not be the default of this process.

  Args:
    data: [2] or [4] uint32.
    impl: kind of the key; None: an earlier version of the library saved it and did not record its
      kind, so it follows from the size of the data.

  >>> str(jax.random.key_impl(_wrap_key(np.zeros(4, np.uint32), None)))
  'rbg'
  """
  if impl is None:
    impl = "threefry2x32" if data.size == 2 else "rbg"
  return jax.random.wrap_key_data(jnp.asarray(data), impl=impl)


def _verify(directory: pathlib.Path) -> None:
  """Raises a CheckpointError on all processes if the files do not match their manifest."""
  problem = ""
  if multihost.is_main_process():
    manifest = run_directory.MANIFEST_FILE
    try:
      if not (directory / manifest).exists():
        progress.log(f"warning: {directory} has no {manifest}; loading it without verification.")
      files.check_manifest(directory, manifest)
    except (OSError, ValueError) as error:
      problem = files.short_message(error).rstrip(".")
  if multihost.broadcast(bool(problem)):
    raise CheckpointError(f"{directory} is damaged or incomplete: {problem}.")


def _abstract_checkpoint(
  config: TransformerConfig, train_cfg: TrainConfig, mesh: jax.sharding.Mesh | None
) -> Checkpoint:
  """Returns a checkpoint with `jax.ShapeDtypeStruct` in place of the arrays of the train state."""
  shapes = train_step_lib.train_state_shapes(config, train_cfg)
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, shapes)
  else:
    shardings = sharding.train_state_shardings(shapes, mesh)
  train_state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  return Checkpoint(config, train_cfg, train_state, rng=jax.random.key(0), data_step=0)


def to_tree(checkpoint: Checkpoint) -> dict[str, ArrayTree]:
  """Returns the arrays of a checkpoint under their names on disk."""
  state = checkpoint.train_state
  return {
    "params": state.params,
    "opt_state": state.opt_state,
    "step": state.step,
    "rng": np.asarray(jax.random.key_data(checkpoint.rng)),
    "data_step": np.asarray(checkpoint.data_step, np.int32),
  }


def orbax() -> ModuleType:
  """Returns the module `orbax.checkpoint`."""
  return optional.require("orbax.checkpoint", extra="train", purpose="checkpoints")
