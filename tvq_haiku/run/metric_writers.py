"""Writers of a run's metrics: JSON lines, TensorBoard, and Weights & Biases on request.

metrics.jsonl    one JSON object per line; its `step` is the number of updates. At 64 MB (about
                 100,000 lines), the file is renamed to metrics-older.jsonl, which replaces the
                 previous file of that name
tensorboard/     event files, at most 128 MB in total
wandb_id         the id of the Weights & Biases run, so that a resumed run continues it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
import contextlib
import json
import math
import os
import pathlib
import time
from types import ModuleType
from typing import Any, Protocol
import uuid

from tvq_haiku.utils import files, optional

_JSONL = "metrics.jsonl"
_OLDER_JSONL = "metrics-older.jsonl"
_MAX_BYTES = 64 * 2**20  # size at which a file is closed and the next one begins; two are kept
_EVENT_OVERHEAD_BYTES = 16  # length and checksums that frame an event in its file
_TENSORBOARD_DIRECTORY = "tensorboard"
_WANDB_ID = "wandb_id"

# Called with the number of updates so far and the metrics; `MetricWriters.write` is one.
RecordMetrics = Callable[[int, Mapping[str, float]], None]


class MetricWriter(Protocol):
  """Writes metrics to one destination."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes `metrics` as measured after `step` updates."""

  def close(self) -> None:
    """Writes what is buffered and releases the destination."""


class JsonlWriter:
  """Appends metrics to metrics.jsonl, which is flushed after every line.

  Opening removes the lines of updates after `step`, because the resumed run writes them again.
  """

  def __init__(self, workdir: pathlib.Path, step: int):
    for file in _jsonl_files(workdir):
      lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
      files.write_atomically(
        file, "".join(line for line in lines if line.endswith("\n") and _line_step(line) <= step)
      )
    self._file, self._older_file = workdir / _JSONL, workdir / _OLDER_JSONL
    self._stream = self._file.open("a", encoding="utf-8")

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one line; starts a new file when this one has reached its size limit."""
    print(json.dumps({"step": step, **finite(metrics)}), file=self._stream, flush=True)
    if self._stream.tell() > _MAX_BYTES:
      self._stream.close()
      os.replace(self._file, self._older_file)
      self._stream = self._file.open("a", encoding="utf-8")

  def close(self) -> None:
    """Closes the file."""
    self._stream.close()


class TensorBoardWriter:
  """Writes metrics as scalars to TensorBoard event files.

  If `directory` holds events of an earlier process, a session start tells TensorBoard to discard
  those of updates after `step`, because the resumed run writes them again.
  """

  def __init__(self, directory: pathlib.Path, step: int):
    # tensorboardX.SummaryWriter writes in a thread and waits forever when the disk is full.
    self._event_files = _tensorboardx("event_file_writer")
    self._events = _tensorboardx("proto.event_pb2")
    self._summary = _tensorboardx("summary")
    self._directory = directory
    is_resumed = directory.exists()
    directory.mkdir(exist_ok=True)
    self._open_file()
    if is_resumed:
      start = self._events.SessionLog(status=self._events.SessionLog.START)
      self._writer.write_event(
        self._events.Event(wall_time=time.time(), step=step + 1, session_log=start)
      )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes one event per metric; starts a new file when this one has reached its size limit."""
    for name, value in metrics.items():
      event = self._events.Event(
        wall_time=time.time(), step=step, summary=self._summary.scalar(name, value)
      )
      self._writer.write_event(event)
      self._written_bytes += event.ByteSize() + _EVENT_OVERHEAD_BYTES
    self._writer.flush()
    if self._written_bytes > _MAX_BYTES:
      self._writer.close()
      self._open_file()

  def close(self) -> None:
    """Closes the event file."""
    self._writer.close()

  def _open_file(self) -> None:
    """Opens a new event file and removes the oldest ones beyond the total size limit."""
    self._writer = self._event_files.EventsWriter(
      str(self._directory / "events"), f".{uuid.uuid4().hex[:8]}"
    )
    self._written_bytes = 0
    event_files = sorted(
      self._directory.glob("events*"), key=lambda file: (file.stat().st_mtime, file.name)
    )
    total_bytes = sum(file.stat().st_size for file in event_files)
    for file in event_files[:-1]:
      if total_bytes <= 2 * _MAX_BYTES:
        return
      total_bytes -= file.stat().st_size
      file.unlink()


class WandbWriter:
  """Sends metrics to a run of a Weights & Biases project; a resumed run keeps its id."""

  def __init__(self, workdir: pathlib.Path, project: str, settings: Mapping[str, Any]):
    wandb = optional.require("wandb", extra="wandb", purpose="Weights & Biases")
    id_file = workdir / _WANDB_ID
    if not id_file.exists():
      files.write_atomically(id_file, uuid.uuid4().hex[:8])
    self._run = wandb.init(
      project=project,
      dir=str(workdir),
      id=id_file.read_text(encoding="utf-8"),
      resume="allow",
      config=dict(settings),
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Logs `metrics` to the run."""
    self._run.log(dict(metrics), step=step)

  def close(self) -> None:
    """Marks the run as finished and waits for the upload."""
    self._run.finish()


class MetricWriters:
  """Writes each set of metrics to several writers, at most once."""

  def __init__(
    self,
    workdir: pathlib.Path,
    writers: Sequence[MetricWriter],
    written: Set[tuple[int, bool]],  # `_step_and_kind` of records that an earlier process wrote
  ):
    self._workdir, self._writers, self._written = workdir, writers, written

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes `metrics` as measured after `step` updates, unless an earlier process did so.

    Raises:
      OSError: a file cannot be written, for instance because the disk is full.
    """
    if _step_and_kind({"step": step, **metrics}) in self._written:
      return
    values = {name: float(value) for name, value in metrics.items()}
    try:
      for writer in self._writers:
        writer.write(step, values)
    except OSError as error:
      raise OSError(f"cannot write metrics to {self._workdir}: {error.strerror}.") from error


@contextlib.contextmanager
def open_writers(
  workdir: str | os.PathLike,
  *,
  step: int = 0,
  tensorboard: bool = True,
  wandb: str | None = None,
  settings: Mapping[str, Any] | None = None,
) -> Iterator[MetricWriters]:
  """Opens the writers of a run that starts, or resumes, after `step` updates.

  Metrics of later updates, which a process wrote before it died, are discarded, because the resumed
  run computes them again.

  Args:
    workdir: directory of the run; created if it is missing.
    step: number of updates made so far.
    tensorboard: whether to write TensorBoard event files.
    wandb: Weights & Biases project to send the metrics to; None: don't send them.
    settings: configuration of the run, shown by Weights & Biases.

  Yields:
    The writers, which are closed when the context ends.

  Raises:
    ImportError: an optional package is missing; the message names the extra to install.
    OSError: `workdir` is not writable.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as workdir:
  ...   with open_writers(workdir, tensorboard=False) as writers:
  ...     writers.write(10, {"loss_lm": 2.5})
  ...   read_records(workdir)
  [{'step': 10, 'loss_lm': 2.5}]
  """
  workdir = files.prepare_directory(workdir)
  with contextlib.ExitStack() as stack:
    writers: list[MetricWriter] = [
      stack.enter_context(contextlib.closing(JsonlWriter(workdir, step)))
    ]
    # The earlier process may have died after it wrote the metrics of this step, and before it
    # noted in validation.json that the validation is done.
    written = {_step_and_kind(record) for record in read_records(workdir) if record["step"] == step}
    if tensorboard:
      writer = TensorBoardWriter(workdir / _TENSORBOARD_DIRECTORY, step)
      writers.append(stack.enter_context(contextlib.closing(writer)))
    if wandb:
      writer = WandbWriter(workdir, wandb, settings or {})
      writers.append(stack.enter_context(contextlib.closing(writer)))
    yield MetricWriters(workdir, writers, written)


def read_records(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the JSON objects of metrics.jsonl, oldest first, without incomplete lines."""
  records = []
  for file in _jsonl_files(pathlib.Path(workdir)):
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
      with contextlib.suppress(ValueError):
        record = json.loads(line)
        # An incomplete line may be valid JSON, such as a number.
        if isinstance(record, dict) and "step" in record:
          records.append(record)
  return records


def finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """Replaces non-finite numbers, which JSON cannot represent, with None.

  >>> finite({"loss": math.nan, "step": 3, "split": "test"})
  {'loss': None, 'step': 3, 'split': 'test'}
  """
  return {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in metrics.items()
  }


def _step_and_kind(record: Mapping[str, float]) -> tuple[int, bool]:
  """Returns the step of a record, and whether it holds validation metrics."""
  return record["step"], any(name.startswith("validation_") for name in record)


def _jsonl_files(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the JSONL files that exist, oldest first."""
  return [file for file in (workdir / _OLDER_JSONL, workdir / _JSONL) if file.exists()]


def _line_step(line: str) -> float:
  """Returns the step of a JSONL line; infinity if the line is not a record."""
  try:
    return json.loads(line)["step"]
  except (KeyError, TypeError, ValueError):
    return math.inf


def _tensorboardx(module: str) -> ModuleType:
  return optional.require(
    f"tensorboardX.{module}", extra="train", purpose="TensorBoard's event files"
  )
