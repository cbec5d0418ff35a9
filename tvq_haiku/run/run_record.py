"""The file experiment.json of a run: what later commands need to know about its experiment."""

from __future__ import annotations

import json
import os
import pathlib
from typing import NamedTuple

from tvq_haiku.checkpoint import run_directory
from tvq_haiku.utils import files

_FILE = "experiment.json"


class RunRecord(NamedTuple):
  """The content of experiment.json; the defaults are for runs that have no such file."""

  name: str | None = None  # of the experiment, such as "pg19"; None: not recorded
  image_size: int | None = None  # height and width in pixels; None: documents are not images
  top_p: float = 0.95  # default of the sampling parameter `top_p`


def write_record(workdir: pathlib.Path, record: RunRecord) -> None:
  """Writes the record of the run in `workdir`."""
  files.write_atomically(workdir / _FILE, json.dumps(record._asdict(), indent=1) + "\n")


def read_record(workdir: str | os.PathLike) -> RunRecord:
  """Returns the record of the run in `workdir`, or the default if it has none.

  Raises:
    CheckpointError: the file is damaged.
  """
  file = pathlib.Path(workdir) / _FILE
  if not file.exists():
    return RunRecord()
  try:
    record = RunRecord(**json.loads(file.read_text(encoding="utf-8")))
    if record.image_size is not None and not int(record.image_size) >= 1:
      raise ValueError(f"image_size is {record.image_size}")
    return record._replace(top_p=float(record.top_p))
  except (TypeError, ValueError) as error:
    raise run_directory.CheckpointError(
      f"{file} is damaged: {files.short_message(error)}. Remove it to use the run as a run of text."
    ) from error


def directory_of_run(workdir: str | os.PathLike) -> pathlib.Path:
  """Returns the directory of the run that `workdir` belongs to.

  That is `workdir`, or its parent if `workdir` is the directory best/ of a run, which holds only a
  checkpoint.
  """
  path = pathlib.Path(workdir)
  parent = path.absolute().parent
  is_best = path.absolute().name == run_directory.BEST_DIRECTORY
  return parent if is_best and (parent / run_directory.CONFIG_FILE).is_file() else path
