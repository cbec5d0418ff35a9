"""Checkpoints: a directory that holds all a run needs to go on, or to be used.

config.json            the model and training configurations
checkpoints/<step>/    parameters, optimizer, step, rng and data position, by orbax; and a
                       manifest.json of its files, against which they are held before reading
damaged/               checkpoints that a run could not go on from
best/                  such a directory again: see `validations`
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import shutil
import threading
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.training import train_step as train_step_lib
from tvq_haiku.types import Array
from tvq_haiku.utils import files, optional, progress

BEST_DIRECTORY = "best"
_CONFIG = "config.json"
_STEPS = "checkpoints"
_ITEM = "default"  # orbax's name for all of a checkpoint
_DAMAGED = "damaged"
_FOR_EVER = 10**10  # seconds: orbax reads them off the clock of the day, which may jump
_MANIFEST = "manifest.json"
_FORMAT = 1
_HOW = ("remat", "reduction", "n_accumulate")


class CheckpointError(ValueError):
  """A checkpoint is missing, damaged, or of another run; the message names it."""


class Checkpoint(NamedTuple):
  """Everything that must survive the process."""

  config: TransformerConfig
  train_cfg: TrainConfig
  train_state: train_step_lib.TrainState
  rng: Array  # typed key of the training steps
  data_step: int  # batches read


class CheckpointWriter:
  """Writes the checkpoints of a run while it goes on; of several hosts, all together.

  What is on disk appears whole or not at all. Leaving the context waits for the last one.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    config: TransformerConfig,
    train_cfg: TrainConfig,
    *,
    max_to_keep: int = 2,
  ):
    """Args are the following.

    Args:
      directory: of the run.
      config: of the model.
      train_cfg: of its training.
      max_to_keep: older ones are removed.

    Raises:
      CheckpointError: the directory belongs to a run of another configuration.
      OSError: it cannot be written.
    """
    self._path = files.prepare_directory(directory)
    if exists(self._path):
      check_same_run(self._path, config, train_cfg)
    elif multihost.is_main_process():
      text = json.dumps(
        {
          "format": _FORMAT,
          "model": json.loads(config.to_json()),
          "train": json.loads(train_cfg.to_json()),
        },
        indent=2,
      )
      files.write_atomically(self._path / _CONFIG, text + "\n")
    multihost.barrier("writer")
    self._pending: int | None = None
    self._error: Exception | None = None
    self._thread: threading.Thread | None = None
    ocp = _orbax()
    with self._named(None):
      self._manager = ocp.CheckpointManager(
        self._path / _STEPS,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=max_to_keep,
          create=True,
          enable_async_checkpointing=True,
          async_options=ocp.AsyncOptions(timeout_secs=_FOR_EVER),
        ),
      )

  def save(self, checkpoint: Checkpoint) -> None:
    """Takes a checkpoint, and writes it in the background when the one before is done.

    Raises:
      CheckpointError: the directory holds a checkpoint of this step or a later one.
      OSError: the one before could not be written.
    """
    self.wait()
    step = int(checkpoint.train_state.step)
    newest = max(saved_steps(self._path), default=None)
    if newest is not None and newest >= step:
      raise CheckpointError(
        f"{self._path} already holds a checkpoint of step {newest}: one of step {step} "
        "is not newer. Use another directory."
      )
    with self._named(
      step
    ):  # returns with a copy in the host's memory: training may go on in the device's
      self._manager.save(step, args=_orbax().args.StandardSave(_to_tree(checkpoint)), force=True)
    self._pending = step
    # The manifest must not wait for the next call: the process may not live to see it.
    self._thread = threading.Thread(
      target=self._complete, args=(step,), name="checkpoint", daemon=True
    )
    self._thread.start()

  def wait(self) -> None:
    """Returns when nothing is left to write.

    Raises:
      OSError: it could not be written.
    """
    if self._pending is None:
      return
    self._thread.join()
    step, self._pending = self._pending, None
    error, self._error = self._error, None
    if error is not None:
      for draft in (self._path / _STEPS).glob(f"{step}.*tmp*"):
        shutil.rmtree(draft, ignore_errors=True)
      with self._named(step):
        raise error

  def _complete(self, step: int) -> None:
    try:
      self._manager.wait_until_finished()
      if multihost.is_main_process():
        files.write_manifest(self._path / _STEPS / str(step), _MANIFEST)
    except Exception as error:  # raised by `wait`
      self._error = error

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: Any, *_) -> None:
    if kind is not None and not multihost.is_single_process():
      return  # the others may be gone: nobody waits for them
    with contextlib.ExitStack() as stack:
      stack.callback(self._close)
      self.wait()

  def _close(self) -> None:
    with contextlib.suppress(Exception):  # what it has to say was said by `wait`
      self._manager.close()

  @contextlib.contextmanager
  def _named(self, step: int | None) -> Iterator[None]:
    """Errors of orbax and tensorstore, which raise whatever they like, with a name to them."""
    try:
      yield
    except Exception as error:
      if multihost.is_peer_failure(error):
        raise
      what = "checkpoints" if step is None else f"the checkpoint of step {step}"
      raise OSError(
        f"{what} cannot be written to {self._path / _STEPS}: {first_line(error)}"
      ) from error


def save_checkpoint(
  directory: str | os.PathLike, checkpoint: Checkpoint, *, max_to_keep: int = 2
) -> None:
  """Writes one checkpoint, and returns when it is there: see `CheckpointWriter`."""
  with CheckpointWriter(
    directory, checkpoint.config, checkpoint.train_cfg, max_to_keep=max_to_keep
  ) as writer:
    writer.save(checkpoint)


def exists(directory: str | os.PathLike) -> bool:
  """Whether the directory is that of a run: a configuration of which nothing was saved is not one.

  Raises:
    CheckpointError: it holds checkpoints whose configuration is lost.
  """
  path = pathlib.Path(directory).absolute()
  if (path / _CONFIG).is_file():
    return bool(saved_steps(path))
  if (path / _STEPS).is_dir() and any((path / _STEPS).iterdir()):
    raise CheckpointError(
      f"{path} holds checkpoints but no {_CONFIG}, without which they cannot be "
      "read. Put it back, or use another directory."
    )
  return False


def load_config(directory: str | os.PathLike) -> tuple[TransformerConfig, TrainConfig]:
  """The configurations of a run."""
  file = pathlib.Path(directory).absolute() / _CONFIG
  if not file.is_file():
    raise CheckpointError(
      f"{file.parent} holds no checkpoint: {_CONFIG} is missing. Name the directory of the run."
    )
  try:
    both = json.loads(file.read_text())
    if both["format"] != _FORMAT:
      raise ValueError(f"format {both['format']!r} is not {_FORMAT}")
    return (
      TransformerConfig.from_json(json.dumps(both["model"])),
      TrainConfig.from_json(json.dumps(both["train"])),
    )
  except (KeyError, TypeError, ValueError) as error:
    raise CheckpointError(
      f"{file} is not a configuration that this version reads: {first_line(error)}"
    ) from error


def saved_steps(directory: str | os.PathLike) -> list[int]:
  """The numbers of updates of all checkpoints, the newest last."""
  path = pathlib.Path(directory).absolute() / _STEPS
  # Orbax gives a checkpoint its name when it is whole.
  return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []


def latest_step(directory: str | os.PathLike) -> int | None:
  """The number of updates of the newest checkpoint, or None."""
  if not (pathlib.Path(directory).absolute() / _CONFIG).is_file():
    return None
  return max(saved_steps(directory), default=None)


def load_checkpoint(
  directory: str | os.PathLike, step: int | None = None, *, mesh: jax.sharding.Mesh | None = None
) -> Checkpoint:
  """Reads a checkpoint; the directory alone says what it is of.

  Args:
    directory: of the run.
    step: which one; None: the newest that is not damaged, with a line on standard error that names
      those that are.
    mesh: where to put it, whatever mesh it was written on; None: one device.

  Raises:
    CheckpointError: there is none, or none that can be read.
  """
  path = pathlib.Path(directory).absolute()
  config, train_cfg = load_config(path)
  there = saved_steps(path)
  if not there:
    raise CheckpointError(f"{path} holds no checkpoint yet: {_STEPS}/ is empty or missing.")
  if step is not None:
    if step not in there:
      raise CheckpointError(f"{path} holds no checkpoint of step {step}; it has {there}.")
    return _read(path, step, config, train_cfg, mesh)
  damage: list[str] = []
  for step in reversed(there):
    try:
      found = _read(path, step, config, train_cfg, mesh)
    except CheckpointError as error:
      if (path / _STEPS / str(step)).exists():  # else the run that goes on has removed it meanwhile
        damage.append(str(error))
      continue
    if multihost.is_main_process():
      for line in damage:
        progress.log(f"warning: {line} Step {step} is used instead.")
    return found
  if not damage:
    return load_checkpoint(path, mesh=mesh)  # what replaced them
  problem = f"{damage[0]} No older one can be read either." if len(damage) > 1 else damage[0]
  if exists(path / BEST_DIRECTORY):
    problem += (
      f" {path / BEST_DIRECTORY} may still be whole: its parameters can be exported, and another run begun "
      "with them."
    )
  raise CheckpointError(problem)


def discard_later(directory: str | os.PathLike, *, after: int) -> None:
  """Moves the checkpoints of later steps, from which the run does not go on, to damaged/."""
  path = pathlib.Path(directory).absolute()
  later = (
    [step for step in saved_steps(path) if step > after] if multihost.is_main_process() else []
  )
  for step in later:
    (path / _DAMAGED).mkdir(exist_ok=True)
    place, aside = path / _STEPS / str(step), files.unused_path(path / _DAMAGED / str(step))
    try:
      with contextlib.suppress(OSError):
        place.chmod(0o755)  # or it cannot be moved
      place.rename(aside)
    except OSError as error:
      raise CheckpointError(
        f"{place} cannot be used, nor moved to {aside} ({error.strerror}). Remove it to "
        f"go on from step {after}."
      ) from error
  multihost.barrier("set aside")


def _read(
  path: pathlib.Path,
  step: int,
  config: TransformerConfig,
  train_cfg: TrainConfig,
  mesh: jax.sharding.Mesh | None,
) -> Checkpoint:
  place, ocp = path / _STEPS / str(step), _orbax()
  shapes = train_step_lib.train_state_shapes(config, train_cfg)
  if mesh is None:
    shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
  else:
    shardings = sharding.train_state_shardings(shapes, mesh)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )
  target = _to_tree(Checkpoint(config, train_cfg, state, jax.random.key(0), 0))
  problem = ""
  if multihost.is_main_process():
    try:
      if not (place / _MANIFEST).exists():
        progress.log(f"warning: {place} has no {_MANIFEST}: it is read without being checked.")
      files.check_manifest(place, _MANIFEST)
    except (OSError, ValueError) as error:
      problem = first_line(error).rstrip(".")
  if multihost.broadcast(bool(problem)):
    raise CheckpointError(f"{place} is damaged or incomplete: {problem}.")
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(place / _ITEM, target)
  except Exception as error:  # orbax and tensorstore raise whatever they like
    if multihost.is_peer_failure(error):
      raise
    reason = first_line(error).rstrip(".")
    raise CheckpointError(f"{place} is damaged or incomplete: {reason}.") from error
  state = train_step_lib.TrainState(tree["params"], tree["opt_state"], tree["step"])
  return Checkpoint(
    config,
    train_cfg,
    state,
    jax.random.wrap_key_data(jnp.asarray(tree["rng"])),
    int(tree["data_step"]),
  )


def check_same_run(
  directory: str | os.PathLike, config: TransformerConfig, train_cfg: TrainConfig
) -> None:
  """Raises, naming the fields that differ, unless the directory is of this configuration.

  Fields that say how it is computed, and not what, may differ.
  """
  theirs = load_config(directory)
  differences = []
  for ours, saved in zip((config, train_cfg), theirs):
    for name, value in json.loads(ours.to_json()).items():
      if name not in _HOW and getattr(saved, name) != value:
        differences.append(f"{name}={getattr(saved, name)!r} there, {value!r} now")
  if differences:
    raise CheckpointError(
      f"{directory} holds a run of another configuration: "
      f"{'; '.join(differences)}. Use another directory, or its settings."
    )


def _to_tree(checkpoint: Checkpoint) -> dict[str, Any]:
  state = checkpoint.train_state
  return {
    "params": state.params,
    "opt_state": state.opt_state,
    "step": state.step,
    "rng": np.asarray(jax.random.key_data(checkpoint.rng)),
    "data_step": np.asarray(checkpoint.data_step, np.int32),
  }


def _orbax() -> Any:
  return optional.require("orbax.checkpoint", extra="train", purpose="checkpoints")


def first_line(error: Exception) -> str:
  """What an error says, in short."""
  text = str(error).strip()
  if "No space left" in text:
    return "no space left on the device"
  return text.splitlines()[0][:200] if text else type(error).__name__
