"""The directory of a training run: its files, its configuration and its checkpoints.

config.json            the model and training configurations, and the kind of the run's random keys
checkpoints/<n>/       a checkpoint after n updates in orbax's format, and manifest.json with the
                       size and checksum of each of its files
damaged/               checkpoints that were set aside because they could not be loaded
best/                  a directory of the same form with the checkpoint of lowest validation loss
"""

from __future__ import annotations

from collections.abc import Container
import contextlib
import dataclasses
import json
import os
import pathlib
from typing import Any

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.parallel import multihost
from tvq_haiku.utils import files

BEST_DIRECTORY = "best"
CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocab.model"  # the SentencePiece vocabulary, if tokens are not bytes
STEPS_DIRECTORY = "checkpoints"
DAMAGED_DIRECTORY = "damaged"
MANIFEST_FILE = "manifest.json"
_FORMAT_VERSION = 1
# Fields that change how a result is computed, but not the result; a resumed run may change them.
_EXECUTION_FIELDS = ("remat", "reduction", "n_accumulate")


class CheckpointError(ValueError):
  """Raised when a checkpoint is missing, damaged or from a different run; the message names it."""


def has_checkpoint(directory: str | os.PathLike) -> bool:
  """Returns whether `directory` holds at least one checkpoint and its configuration.

  Raises:
    CheckpointError: there are checkpoints, but their configuration is missing.
  """
  path = pathlib.Path(directory).absolute()
  if (path / CONFIG_FILE).is_file():
    return bool(saved_steps(path))
  steps = path / STEPS_DIRECTORY
  if steps.is_dir() and any(steps.iterdir()):
    raise CheckpointError(
      f"{path} holds checkpoints but no {CONFIG_FILE}, and they cannot be loaded without it. "
      "Restore the file or use another directory (--workdir)."
    )
  return False


def saved_steps(directory: str | os.PathLike) -> list[int]:
  """Returns the numbers of updates of all complete checkpoints, in ascending order."""
  path = pathlib.Path(directory).absolute() / STEPS_DIRECTORY
  # Orbax writes to a directory with another name, and renames it when the checkpoint is complete.
  return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.is_dir() else []


def latest_step(directory: str | os.PathLike) -> int | None:
  """Returns the number of updates of the newest checkpoint, or None if there is none."""
  if not (pathlib.Path(directory).absolute() / CONFIG_FILE).is_file():
    return None
  return max(saved_steps(directory), default=None)


def step_directory(directory: pathlib.Path, step: int) -> pathlib.Path:
  """Returns the path of the checkpoint after `step` updates in the run's directory."""
  return directory / STEPS_DIRECTORY / str(step)


def write_config(
  directory: pathlib.Path,
  config: TransformerConfig,
  train_cfg: TrainConfig,
  *,
  rng_impl: str | None = None,
) -> None:
  """Writes the configurations of a run to `config.json`.

  Args:
    directory: the directory of the run.
    config: configuration of the model.
    train_cfg: configuration of its training.
    rng_impl: kind of the run's random keys; None: it is not recorded.
  """
  content = {
    "format": _FORMAT_VERSION,
    "model": json.loads(config.to_json()),
    "train": json.loads(train_cfg.to_json()),
  }
  if rng_impl is not None:
    content["rng_impl"] = rng_impl
  files.write_atomically(directory / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def load_config(directory: str | os.PathLike) -> tuple[TransformerConfig, TrainConfig]:
  """Reads the model and training configurations of a run.

  Raises:
    CheckpointError: `config.json` is missing, damaged or incompatible with this version.
  """
  return _read_config(directory)[:2]


def load_rng_impl(directory: str | os.PathLike) -> str | None:
  """Returns the kind of a run's random keys, or None if `config.json` does not record it.

  Raises:
    CheckpointError: `config.json` is missing, damaged or incompatible with this version.
  """
  return _read_config(directory)[2]


def _read_config(
  directory: str | os.PathLike,
) -> tuple[TransformerConfig, TrainConfig, str | None]:
  """Returns the content of `config.json`."""
  file = pathlib.Path(directory).absolute() / CONFIG_FILE
  if not file.is_file():
    if not file.parent.exists():
      problem = "it does not exist"
    else:
      problem = f"{CONFIG_FILE} is missing"
    raise CheckpointError(
      f"{file.parent} holds no checkpoint: {problem}. Pass the directory of a run."
    )
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["format"] != _FORMAT_VERSION:
      raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT_VERSION}")
    return (
      TransformerConfig.from_json(json.dumps(content["model"])),
      TrainConfig.from_json(json.dumps(content["train"])),
      content.get("rng_impl"),
    )
  except (KeyError, TypeError, ValueError) as error:
    raise CheckpointError(
      f"{file} is damaged or was written by an incompatible version: {files.short_message(error)}"
    ) from error


def check_same_run(
  directory: str | os.PathLike, config: TransformerConfig, train_cfg: TrainConfig
) -> None:
  """Raises unless the run in `directory` can be resumed with the given configurations.

  Fields that change how a result is computed, but not the result, may differ; n_extra_step may be
  larger than in the run.

  Args:
    directory: directory of the run.
    config: model configuration to compare with the saved one.
    train_cfg: training configuration to compare with the saved one.

  Raises:
    CheckpointError: a field differs; the message names all such fields with both values.
  """
  differences = {
    name: f"{name} is {getattr(saved, name)!r} in the run, {getattr(given, name)!r} here"
    for given, saved in zip((config, train_cfg), load_config(directory), strict=True)
    for name in sorted(field.name for field in dataclasses.fields(given))
    if not _may_resume(name, getattr(saved, name), getattr(given, name))
  }
  if differences:
    n_max_step = load_config(directory)[1].n_max_step
    raise CheckpointError(
      f"{directory} holds a run with a different configuration: {'; '.join(differences.values())}. "
      + _advice(directory, differences, n_max_step)
    )


def _may_resume(name: str, saved: Any, given: Any) -> bool:
  """Returns whether a run with the value `saved` of a field may be resumed with the value `given`.

  Args:
    name: name of the field.
    saved: its value in the run.
    given: its value now.
  """
  if name == "n_extra_step":
    return given >= saved
  return name in _EXECUTION_FIELDS or given == saved


def _advice(directory: str | os.PathLike, differences: Container[str], n_max_step: int) -> str:
  """Returns the end of the message about fields that differ: what the user can do.

  Args:
    directory: directory of the run.
    differences: names of the fields that differ.
    n_max_step: the n_max_step of the run.
  """
  if "n_max_step" in differences:
    return (
      "To make more updates, keep n_max_step and set n_extra_step "
      f"(--config.n_max_step={n_max_step} --config.n_extra_step=N), which continues at the last "
      "learning rate. For other settings or data, start a new run from the parameters of this one: "
      f"--init={directory} --workdir=OTHER."
    )
  if "n_extra_step" in differences:
    return "n_extra_step can be raised, but not lowered."
  return "Use the settings of that run, or another directory (--workdir)."


def extend(directory: pathlib.Path, train_cfg: TrainConfig) -> None:
  """Writes the n_extra_step of `train_cfg` to `config.json` if it is larger than the saved one."""
  config, saved, rng_impl = _read_config(directory)
  if train_cfg.n_extra_step > saved.n_extra_step:
    longer = saved.replace(n_extra_step=train_cfg.n_extra_step)
    write_config(directory, config, longer, rng_impl=rng_impl)


def set_aside_later(directory: str | os.PathLike, *, after: int) -> None:
  """Moves the checkpoints of more than `after` updates to `damaged/`.

  A run calls this before it resumes after `after` updates, because it will save the later
  checkpoints again. All processes must call it.

  Raises:
    CheckpointError: a checkpoint cannot be moved; the message names it.
  """
  path = pathlib.Path(directory).absolute()
  steps = saved_steps(path) if multihost.is_main_process() else []
  for step in (step for step in steps if step > after):
    (path / DAMAGED_DIRECTORY).mkdir(exist_ok=True)
    source = step_directory(path, step)
    target = files.unused_path(path / DAMAGED_DIRECTORY / str(step))
    try:
      with contextlib.suppress(OSError):
        source.chmod(0o755)  # a directory without permissions cannot be moved
      source.rename(target)
    except OSError as error:
      raise CheckpointError(
        f"{source} can be neither loaded nor moved to {target} ({error.strerror}). Remove it to "
        f"resume after {after} updates."
      ) from error
  multihost.barrier("set aside")
