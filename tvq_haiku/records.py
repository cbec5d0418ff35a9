"""What a run measured, step by step: JSON lines, TensorBoard, and Weights & Biases when asked for.

  metrics.jsonl    one JSON object a line, with its `step`
  tensorboard/     event files
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
from typing import Any, Protocol
import uuid

from tvq_haiku import extras
from tvq_haiku import files

_LINES = "metrics.jsonl"
_EVENTS = "tensorboard"
_WANDB_ID = "wandb_id"


class Record(Protocol):
  """What a loop calls with its measurements."""

  def __call__(self, step: int, values: Mapping[str, float]) -> None:
    """Notes `values` after `step` updates."""


@contextlib.contextmanager
def open_records(workdir: str | os.PathLike, *, step: int = 0, tensorboard: bool = True,
                 wandb: str | None = None, settings: Mapping[str, Any] | None = None) -> Iterator[Record]:
  """Opens the records of a run that goes on after `step` updates.

  What was noted of later steps, before the process died, is forgotten: it will come again.

  Args:
    workdir: of the run.
    step: updates made.
    tensorboard: write event files too.
    wandb: a project of Weights & Biases to send everything to.
    settings: of the run, for the same.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as workdir:
  ...   with open_records(workdir, tensorboard=False) as record:
  ...     record(10, {"loss_lm": 2.5})
  ...   read_records(workdir)
  [{'step': 10, 'loss_lm': 2.5}]
  """
  workdir = files.prepare_directory(workdir)
  with contextlib.ExitStack() as stack:
    sinks = [_json_lines(workdir / _LINES, step, stack)]
    if tensorboard:
      sinks.append(_tensorboard(workdir / _EVENTS, step, stack))
    if wandb:
      sinks.append(_wandb(workdir, wandb, settings, stack))

    def record(step: int, values: Mapping[str, float]) -> None:
      for sink in sinks:
        sink(step, {name: float(value) for name, value in values.items()})

    yield record


def read_records(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """All lines of metrics.jsonl; one that a dying process broke off is left out."""
  file = pathlib.Path(workdir) / _LINES
  records = []
  for line in file.read_text().splitlines() if file.exists() else []:
    with contextlib.suppress(ValueError):
      record = json.loads(line)
      if isinstance(record, dict):  # the beginning of a line may be a number
        records.append(record)
  return records


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
  """The values with null for what is no number in JSON.

  >>> finite({"loss": math.nan, "step": 3})
  {'loss': None, 'step': 3}
  """
  return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _json_lines(file: pathlib.Path, step: int, stack: contextlib.ExitStack) -> Record:
  if file.exists():
    kept = [record for record in read_records(file.parent) if record["step"] <= step]
    files.write_whole(file, "".join(json.dumps(record) + "\n" for record in kept))
  stream = stack.enter_context(file.open("a"))

  def record(step: int, values: Mapping[str, float]) -> None:
    print(json.dumps({"step": step, **finite(values)}), file=stream, flush=True)

  return record


def _tensorboard(directory: pathlib.Path, step: int, stack: contextlib.ExitStack) -> Record:
  module = extras.load("tensorboardX", extra="train", purpose="TensorBoard's event files")
  # Of an earlier process, what comes after `step` is forgotten.
  writer = module.SummaryWriter(str(directory), purge_step=step + 1 if directory.exists() else None)
  stack.callback(writer.close)

  def record(step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      writer.add_scalar(name, value, step)
    writer.flush()

  return record


def _wandb(workdir: pathlib.Path, project: str, settings: Mapping[str, Any] | None,
           stack: contextlib.ExitStack) -> Record:
  wandb = extras.load("wandb", extra="wandb", purpose="Weights & Biases")
  file = workdir / _WANDB_ID  # so that a run which goes on is the same run there
  if not file.exists():
    files.write_whole(file, uuid.uuid4().hex[:8])
  run = wandb.init(project=project, dir=str(workdir), id=file.read_text(), resume="allow",
                   config=dict(settings or {}))
  stack.callback(run.finish)
  return lambda step, values: run.log(dict(values), step=step)
