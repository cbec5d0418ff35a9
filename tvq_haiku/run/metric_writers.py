"""What a run measured, step by step: JSON lines, TensorBoard, and Weights & Biases when asked for.

metrics.jsonl    one JSON object a line, with its `step`; after 64 MB, which are some 100,000 lines,
                 it becomes metrics-older.jsonl, and what bore that name is gone
tensorboard/     event files, of 128 MB at most
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any, Protocol
import uuid

from tvq_haiku.utils import files, optional

_LINES = "metrics.jsonl"
_OLDER_LINES = "metrics-older.jsonl"
_MAX_BYTES = 64 * 2**20  # of a file, before another one is begun; of two, the older one goes
_EVENTS = "tensorboard"
_WANDB_ID = "wandb_id"


class RecordMetrics(Protocol):
  """What a loop calls with its measurements."""

  def __call__(self, step: int, values: Mapping[str, float]) -> None:
    """Notes `values` after `step` updates."""


@contextlib.contextmanager
def open_writers(
  workdir: str | os.PathLike,
  *,
  step: int = 0,
  tensorboard: bool = True,
  wandb: str | None = None,
  settings: Mapping[str, Any] | None = None,
) -> Iterator[RecordMetrics]:
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
    sinks = [_json_lines(workdir, step, stack)]
    # A process may die after it recorded a validation, and before it noted that there was one.
    known = {_kind(record) for record in read_records(workdir) if record["step"] == step}
    if tensorboard:
      sinks.append(_tensorboard(workdir / _EVENTS, step, stack))
    if wandb:
      sinks.append(_wandb(workdir, wandb, settings, stack))

    def record(step: int, values: Mapping[str, float]) -> None:
      if _kind({"step": step, **values}) not in known:
        try:
          for sink in sinks:
            sink(step, {name: float(value) for name, value in values.items()})
        except OSError as error:
          raise OSError(f"cannot write the records in {workdir}: {error.strerror}.") from error

    yield record


def read_records(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """All lines of metrics.jsonl; one that a dying process broke off is left out."""
  records = []
  for file in _line_files(pathlib.Path(workdir)):
    for line in file.read_text(errors="replace").splitlines():
      with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and "step" in record:  # the beginning of a line may be a number
          records.append(record)
  return records


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
  """The values with null for what is no number in JSON.

  >>> finite({"loss": math.nan, "step": 3})
  {'loss': None, 'step': 3}
  """
  return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _kind(record: Mapping[str, Any]) -> tuple[int, bool]:
  """Its step, and whether it is of a validation."""
  return record["step"], any(name.startswith("validation_") for name in record)


def _line_files(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Those there are, the oldest first."""
  return [file for file in (workdir / _OLDER_LINES, workdir / _LINES) if file.exists()]


def _json_lines(workdir: pathlib.Path, step: int, stack: contextlib.ExitStack) -> RecordMetrics:
  for file in _line_files(workdir):
    kept = [
      line
      for line in file.read_text(errors="replace").splitlines(keepends=True)
      if line.endswith("\n") and _step(line) <= step
    ]
    files.write_atomically(file, "".join(kept))
  stream = (workdir / _LINES).open("a")
  stack.callback(lambda: stream.close())

  def record(step: int, values: Mapping[str, float]) -> None:
    nonlocal stream
    print(json.dumps({"step": step, **finite(values)}), file=stream, flush=True)
    if stream.tell() > _MAX_BYTES:
      stream.close()
      os.replace(workdir / _LINES, workdir / _OLDER_LINES)
      stream = (workdir / _LINES).open("a")

  return record


def _step(line: str) -> float:
  """Of a line; infinite if it is none."""
  try:
    return json.loads(line)["step"]
  except (KeyError, TypeError, ValueError):
    return math.inf


def _tensorboard(directory: pathlib.Path, step: int, stack: contextlib.ExitStack) -> RecordMetrics:
  # Its SummaryWriter writes in a thread, and waits for it for ever if the disk is full.
  files_of = optional.require(
    "tensorboardX.event_file_writer", extra="train", purpose="TensorBoard's event files"
  )
  event_of = optional.require(
    "tensorboardX.proto.event_pb2", extra="train", purpose="TensorBoard's event files"
  )
  scalar = optional.require(
    "tensorboardX.summary", extra="train", purpose="TensorBoard's event files"
  ).scalar
  goes_on = directory.exists()
  directory.mkdir(exist_ok=True)

  def opened() -> Any:
    return files_of.EventsWriter(str(directory / "events"), f".{uuid.uuid4().hex[:8]}")

  writer, written = opened(), 0
  _remove_oldest(directory)
  if goes_on:  # of an earlier process, what comes after `step` is forgotten
    session = event_of.SessionLog(status=event_of.SessionLog.START)
    writer.write_event(event_of.Event(wall_time=time.time(), step=step + 1, session_log=session))
  stack.callback(lambda: writer.close())

  def record(step: int, values: Mapping[str, float]) -> None:
    nonlocal writer, written
    for name, value in values.items():
      event = event_of.Event(wall_time=time.time(), step=step, summary=scalar(name, value))
      writer.write_event(event)
      written += event.ByteSize() + 16
    writer.flush()
    if written > _MAX_BYTES:
      writer.close()
      writer, written = opened(), 0
      _remove_oldest(directory)

  return record


def _remove_oldest(directory: pathlib.Path) -> None:
  """Event files of more than twice what one may hold, all together, lose the oldest."""
  events = sorted(directory.glob("events*"), key=lambda file: (file.stat().st_mtime, file.name))
  total = sum(file.stat().st_size for file in events)
  for file in events[:-1]:
    if total <= 2 * _MAX_BYTES:
      return
    total -= file.stat().st_size
    file.unlink()


def _wandb(
  workdir: pathlib.Path,
  project: str,
  settings: Mapping[str, Any] | None,
  stack: contextlib.ExitStack,
) -> RecordMetrics:
  wandb = optional.require("wandb", extra="wandb", purpose="Weights & Biases")
  file = workdir / _WANDB_ID  # so that a run which goes on is the same run there
  if not file.exists():
    files.write_atomically(file, uuid.uuid4().hex[:8])
  run = wandb.init(
    project=project,
    dir=str(workdir),
    id=file.read_text(),
    resume="allow",
    config=dict(settings or {}),
  )
  stack.callback(run.finish)
  return lambda step, values: run.log(dict(values), step=step)
