"""Checkpoints: a directory that holds all a run needs to go on, or to be used.

  config.json            the model and training configurations
  checkpoints/<step>/    parameters, optimizer, step, rng and data position, by orbax; and a
                         manifest.json of its files, against which they are held before reading
  best/                  such a directory again: the checkpoint that validation liked best
  validation.json        what it found, and when
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku import extras
from tvq_haiku import files
from tvq_haiku import train
from tvq_haiku.config import TrainConfig, TransformerConfig

Array = jax.Array

BEST = "best"
_CONFIG = "config.json"
_VALIDATION = "validation.json"
_STEPS = "checkpoints"
_MANIFEST = "manifest.json"
_FORMAT = 1


class CheckpointError(ValueError):
  """A checkpoint is missing, damaged, or of another run; the message names it."""


class Checkpoint(NamedTuple):
  """Everything that must survive the process."""

  config: TransformerConfig
  train_cfg: TrainConfig
  train_state: train.TrainState
  rng: Array  # typed key of the training steps
  data_step: int  # batches read


def save_checkpoint(directory: str | os.PathLike, checkpoint: Checkpoint, *,
                    max_to_keep: int = 2) -> None:
  """Writes a checkpoint; what is there appears whole or not at all.

  Args:
    directory: of the run.
    checkpoint: what to keep.
    max_to_keep: older ones are removed.

  Raises:
    CheckpointError: the directory belongs to a run of another configuration, or holds a
      checkpoint of this step or a later one.
    OSError: it cannot be written.
  """
  path = files.prepare_directory(directory)
  if exists(path):
    check_same_run(path, checkpoint.config, checkpoint.train_cfg)
  else:
    text = json.dumps({
        "format": _FORMAT, "model": json.loads(checkpoint.config.to_json()),
        "train": json.loads(checkpoint.train_cfg.to_json())}, indent=2)
    files.write_whole(path / _CONFIG, text + "\n")
  step = int(checkpoint.train_state.step)
  with _manager(path, max_to_keep) as manager:
    newest = manager.latest_step()
    if newest is not None and newest >= step:
      raise CheckpointError(f"{path} already holds a checkpoint of step {newest}: one of step {step} "
                            "is not newer. Use another directory.")
    manager.save(step, args=_orbax().args.StandardSave(_to_tree(checkpoint)), force=True)
    manager.wait_until_finished()
  files.write_manifest(path / _STEPS / str(step), _MANIFEST)


class Validated(NamedTuple):
  """What validation found so far."""

  step: int = -1  # of the last one
  best_step: int = -1
  best_loss: float = math.inf


def validated(directory: str | os.PathLike) -> Validated:
  """What `keep_best` noted in the directory of a run."""
  file = pathlib.Path(directory) / _VALIDATION
  if not file.exists():
    return Validated()
  try:
    return Validated(**json.loads(file.read_text()))
  except (TypeError, ValueError) as error:
    raise CheckpointError(f"{file} is damaged: {_first_line(error)}. Remove it, and {BEST}/ beside "
                          "it, to begin validation anew.") from error


def keep_best(directory: str | os.PathLike, checkpoint: Checkpoint, loss: float) -> bool:
  """Notes what validation found, and saves the checkpoint under `best` if it is the best so far.

  Args:
    directory: of the run.
    checkpoint: what was validated.
    loss: on the validation split; less is better.

  Returns:
    Whether it is.
  """
  path, step = pathlib.Path(directory), int(checkpoint.train_state.step)
  before = validated(path)
  better = loss < before.best_loss
  if better:
    newest = latest_step(path / BEST)
    # It is there already if the process died before it was noted.
    if newest is None or newest < step:
      save_checkpoint(path / BEST, checkpoint, max_to_keep=1)
  now = Validated(step, step, loss) if better else before._replace(step=step)
  files.write_whole(path / _VALIDATION, json.dumps(now._asdict()))
  return better


def exists(directory: str | os.PathLike) -> bool:
  """Whether the directory is that of a run.

  Raises:
    CheckpointError: it holds checkpoints whose configuration is lost.
  """
  path = pathlib.Path(directory).absolute()
  if (path / _CONFIG).is_file():
    return True
  if (path / _STEPS).is_dir() and any((path / _STEPS).iterdir()):
    raise CheckpointError(f"{path} holds checkpoints but no {_CONFIG}, without which they cannot be "
                          "read. Put it back, or use another directory.")
  return False


def load_config(directory: str | os.PathLike) -> tuple[TransformerConfig, TrainConfig]:
  """The configurations of a run."""
  file = pathlib.Path(directory).absolute() / _CONFIG
  if not file.is_file():
    raise CheckpointError(f"{file.parent} holds no checkpoint: {_CONFIG} is missing. "
                          "Name the directory of the run.")
  try:
    both = json.loads(file.read_text())
    if both["format"] != _FORMAT:
      raise ValueError(f"format {both['format']!r} is not {_FORMAT}")
    return (TransformerConfig.from_json(json.dumps(both["model"])),
            TrainConfig.from_json(json.dumps(both["train"])))
  except (KeyError, TypeError, ValueError) as error:
    raise CheckpointError(f"{file} is not a configuration that this version reads: "
                          f"{_first_line(error)}") from error


def latest_step(directory: str | os.PathLike) -> int | None:
  """The number of updates of the newest checkpoint, or None."""
  path = pathlib.Path(directory).absolute()
  if not (path / _CONFIG).is_file() or not (path / _STEPS).is_dir():
    return None
  with _manager(path) as manager:
    return manager.latest_step()


def load_checkpoint(directory: str | os.PathLike, step: int | None = None) -> Checkpoint:
  """Reads a checkpoint; the directory alone says what it is of.

  Args:
    directory: of the run.
    step: which one; None: the newest.

  Raises:
    CheckpointError: there is none, or it cannot be read.
  """
  path = pathlib.Path(directory).absolute()
  config, train_cfg = load_config(path)
  newest = latest_step(path)
  if newest is None:
    raise CheckpointError(f"{path} holds no checkpoint yet: {_STEPS}/ is empty or missing.")
  step = newest if step is None else step
  target = jax.eval_shape(lambda: _to_tree(Checkpoint(
      config, train_cfg, train.init_train_state(config, train_cfg, jax.random.key(0)),
      jax.random.key(0), 0)))
  with _manager(path) as manager:
    if step not in manager.all_steps():
      raise CheckpointError(f"{path} holds no checkpoint of step {step}; it has "
                            f"{sorted(manager.all_steps())}.")
    try:
      files.check_manifest(path / _STEPS / str(step), _MANIFEST)
      tree = manager.restore(step, args=_orbax().args.StandardRestore(target))
    except Exception as error:  # orbax and tensorstore raise whatever they like
      older = [other for other in sorted(manager.all_steps()) if other < step]
      advice = f" Remove it to go on from step {older[-1]}." if older else ""
      raise CheckpointError(f"{path / _STEPS / str(step)} is damaged or incomplete: "
                            f"{_first_line(error)}{advice}") from error
  state = train.TrainState(tree["params"], tree["opt_state"], tree["step"])
  return Checkpoint(config, train_cfg, state, jax.random.wrap_key_data(tree["rng"]),
                    int(tree["data_step"]))


def check_same_run(directory: str | os.PathLike, config: TransformerConfig,
                   train_cfg: TrainConfig) -> None:
  """Raises, naming the fields that differ, unless the directory is of this configuration."""
  theirs = load_config(directory)
  differences = []
  for ours, saved in zip((config, train_cfg), theirs):
    for name, value in json.loads(ours.to_json()).items():
      if getattr(saved, name) != value:
        differences.append(f"{name}={getattr(saved, name)!r} there, {value!r} now")
  if differences:
    raise CheckpointError(f"{directory} holds a run of another configuration: "
                          f"{'; '.join(differences)}. Use another directory, or its settings.")


def _to_tree(checkpoint: Checkpoint) -> dict[str, Any]:
  state = checkpoint.train_state
  return {"params": state.params, "opt_state": state.opt_state, "step": state.step,
          "rng": jax.random.key_data(checkpoint.rng),
          "data_step": jnp.asarray(checkpoint.data_step, jnp.int32)}


def _orbax() -> Any:
  return extras.load("orbax.checkpoint", extra="train", purpose="checkpoints")


def _manager(path: pathlib.Path, max_to_keep: int | None = None) -> Any:
  ocp = _orbax()
  options = ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep, enable_async_checkpointing=False, create=max_to_keep is not None)
  return ocp.CheckpointManager(path / _STEPS, options=options)


def _first_line(error: Exception) -> str:
  text = str(error).strip()
  return text.splitlines()[0][:200] if text else type(error).__name__
