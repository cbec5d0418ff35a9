"""What validation found, and the checkpoint it liked best.

best/              the directory of a run that holds only this checkpoint
validation.json    what was found, and when
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import NamedTuple

from tvq_haiku.checkpoint import checkpoint_writer, checkpoints, run_directory
from tvq_haiku.parallel import multihost
from tvq_haiku.utils import files

_VALIDATION = "validation.json"


class Validated(NamedTuple):
  """What validation found so far."""

  step: int = -1  # of the last one
  best_step: int = -1
  best_loss: float = math.inf


def read_validations(directory: str | os.PathLike) -> Validated:
  """What `keep_best` noted in the directory of a run."""
  file = pathlib.Path(directory) / _VALIDATION
  if not file.exists():
    return Validated()
  try:
    return Validated(**json.loads(file.read_text()))
  except (TypeError, ValueError) as error:
    raise checkpoints.CheckpointError(
      f"{file} is damaged: {files.short_message(error)}. Remove it, and {run_directory.BEST_DIRECTORY}/ beside it, "
      "to begin validation anew."
    ) from error


def keep_best(
  directory: str | os.PathLike, checkpoint: checkpoints.Checkpoint, loss: float
) -> bool:
  """Notes what validation found, and saves the checkpoint under `best` if it is the best so far.

  Args:
    directory: of the run.
    checkpoint: what was validated.
    loss: on the validation split; less is better.

  Returns:
    Whether it is.
  """
  path, step = pathlib.Path(directory), int(checkpoint.train_state.step)
  best = path / run_directory.BEST_DIRECTORY
  before = read_validations(path)
  better = bool(multihost.broadcast(loss < before.best_loss))
  if better:
    # Later ones are from before the run went back to an older checkpoint. And it is there already if
    # the process died before it was noted.
    run_directory.set_aside_later(best, after=step)
    if step not in run_directory.saved_steps(best):
      checkpoint_writer.save_checkpoint(best, checkpoint, max_to_keep=1)
  now = Validated(step, step, loss) if better else before._replace(step=step)
  if multihost.is_main_process():
    files.write_atomically(path / _VALIDATION, json.dumps(now._asdict()))
  return better
