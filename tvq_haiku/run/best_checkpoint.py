"""The checkpoint with the lowest validation loss.

best/              a run directory that holds only this checkpoint
validation.json    the numbers of updates at the last and at the best validation so far, and the
                   metrics of the best one
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import NamedTuple

from tvq_haiku.checkpoint import checkpoint_writer, checkpoints, run_directory
from tvq_haiku.parallel import multihost
from tvq_haiku.utils import files

_VALIDATION_FILE = "validation.json"


class ValidationStatus(NamedTuple):
  """Outcome of the validations of a run so far; the content of validation.json."""

  step: int = -1  # updates made before the last validation; -1: none
  best_step: int = -1  # updates made before the validation with the lowest loss; -1: none
  best_loss: float = math.inf  # loss of that validation in nats per token
  best_metrics: Mapping[str, float] = {}  # all metrics of that validation; empty: not recorded

  @property
  def known_metrics(self) -> Mapping[str, float]:
    """The metrics of the best validation; only the loss if the others were not recorded."""
    return self.best_metrics or {"loss_lm": self.best_loss}


def read_validations(directory: str | os.PathLike) -> ValidationStatus:
  """Returns the outcome of the validations of the run in `directory`.

  Raises:
    CheckpointError: the file is damaged.
  """
  file = pathlib.Path(directory) / _VALIDATION_FILE
  if not file.exists():
    return ValidationStatus()
  try:
    return ValidationStatus(**json.loads(file.read_text(encoding="utf-8")))
  except (TypeError, ValueError) as error:
    raise run_directory.CheckpointError(
      f"{file} is damaged: {files.short_message(error)}. To forget the validations so far, "
      f"remove it and the directory {run_directory.BEST_DIRECTORY}/ next to it."
    ) from error


def keep_best(
  directory: str | os.PathLike, checkpoint: checkpoints.Checkpoint, metrics: Mapping[str, float]
) -> bool:
  """Records a validation, and saves its checkpoint under best/ if its loss is the lowest so far.

  Args:
    directory: directory of the run.
    checkpoint: the validated checkpoint.
    metrics: its metrics on the validation split, with `loss_lm` in nats per token.

  Returns:
    Whether the loss is the lowest so far.

  Raises:
    CheckpointError: validation.json is damaged.
    OSError: the checkpoint cannot be written.
  """
  path, step = pathlib.Path(directory), int(checkpoint.train_state.step)
  best_directory = path / run_directory.BEST_DIRECTORY
  status, loss = read_validations(path), metrics["loss_lm"]
  is_best = bool(multihost.broadcast(loss < status.best_loss))
  if is_best:
    # If the run was resumed from an older checkpoint, best/ may hold a later one. It holds this
    # one already if an earlier process died before it wrote validation.json.
    run_directory.set_aside_later(best_directory, after=step)
    if step not in run_directory.saved_steps(best_directory):
      checkpoint_writer.save_checkpoint(best_directory, checkpoint, max_to_keep=1)
    status = ValidationStatus(step, step, loss, dict(metrics))
  else:
    status = status._replace(step=step)
  if multihost.is_main_process():
    files.write_atomically(path / _VALIDATION_FILE, json.dumps(status._asdict()))
  return is_best
