"""Records: every line, none twice, whatever happened in between."""

import errno
import os
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from tvq_haiku.run import metric_writers


def write(workdir, steps, **kwargs):
  with metric_writers.open_writers(workdir, **kwargs) as writers:
    for step in steps:
      writers.write(step, {"loss_lm": step / 10})


def test_what_is_noted_can_be_read(tmp_path):
  write(tmp_path, [10, 20])
  assert metric_writers.read_records(tmp_path) == [
    {"step": 10, "loss_lm": 1.0},
    {"step": 20, "loss_lm": 2.0},
  ]
  assert [path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir()] == [True]


def test_a_run_that_goes_on_forgets_what_will_come_again(tmp_path):
  write(tmp_path, [10, 20, 30], tensorboard=False)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 40, "los')  # the process died while it wrote
  write(tmp_path, [30, 40], step=20, tensorboard=False)
  assert [line["step"] for line in metric_writers.read_records(tmp_path)] == [10, 20, 30, 40]
  assert not (tmp_path / "tensorboard").exists()


def test_half_a_line_that_is_a_number_and_what_is_no_number(tmp_path):
  with metric_writers.open_writers(tmp_path, tensorboard=False) as writers:
    writers.write(1, {"loss_lm": float("nan"), "word_perplexity": float("inf"), "grad_norm": 1.0})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write("12")
  write(tmp_path, [2], step=1, tensorboard=False)
  assert metric_writers.read_records(tmp_path) == [
    {"step": 1, "loss_lm": None, "word_perplexity": None, "grad_norm": 1.0},
    {"step": 2, "loss_lm": 0.2},
  ]


def events(workdir):
  """(step, name, value) of scalars, and (step, None, None) where a session starts, by file and time."""
  found = []
  for file in sorted((workdir / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
    content = file.read_bytes()
    while content:  # length, its checksum, the event, its checksum
      n = int.from_bytes(content[:8], "little")
      event = event_pb2.Event.FromString(content[12 : 12 + n])
      content = content[16 + n :]
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      if event.session_log.status == event_pb2.SessionLog.START:
        found.append((event.step, None, None))
  return found


def test_event_files_forget_too(tmp_path):
  for step in (0, 0, 20):
    write(tmp_path, [step + 10], step=step)
  assert events(tmp_path) == [
    (10, "loss_lm", 1.0),
    (1, None, None),
    (10, "loss_lm", 1.0),
    (21, None, None),
    (30, "loss_lm", 3.0),
  ]


def test_a_full_disk_is_an_error_not_a_wait(tmp_path, monkeypatch):

  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  with metric_writers.open_writers(tmp_path) as writers:
    writers.write(1, {"loss_lm": 1.0})
    with monkeypatch.context() as patch:
      patch.setattr(os, "fsync", full)  # with which event files are flushed
      with pytest.raises(OSError, match=r"cannot write metrics to .*: No space left"):
        writers.write(2, {"loss_lm": 1.0})


def test_nothing_noted_yet(tmp_path):
  assert metric_writers.read_records(tmp_path) == []


@pytest.fixture
def wandb(monkeypatch):
  """Stands in for the service: what was sent, by run."""
  sent = types.SimpleNamespace(inits=[], lines=[], finished=0)

  class Run:
    def log(self, values, step):
      sent.lines.append((step, values))

    def finish(self):
      sent.finished += 1

  module = types.ModuleType("wandb")
  module.init = lambda **kwargs: sent.inits.append(kwargs) or Run()
  monkeypatch.setitem(sys.modules, "wandb", module)
  return sent


def test_weights_and_biases_when_asked_for(tmp_path, wandb):
  write(tmp_path, [10], tensorboard=False)
  assert not wandb.inits
  for steps in ([20], [30]):
    write(tmp_path, steps, step=10, tensorboard=False, wandb="novels", settings={"d_model": 8})
  assert wandb.lines == [(20, {"loss_lm": 2.0}), (30, {"loss_lm": 3.0})] and wandb.finished == 2
  first, second = wandb.inits
  assert first == second and first["project"] == "novels" and first["config"] == {"d_model": 8}
  assert first["resume"] == "allow" and len(first["id"]) == 8


def test_missing_packages_are_named(tmp_path, monkeypatch):
  def missing(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr("importlib.import_module", missing)
  for kwargs, message in (
    (dict(), r"tensorboardX.*tvq_haiku\[train\]"),
    (dict(tensorboard=False, wandb="x"), r"wandb.*tvq_haiku\[wandb\]"),
  ):
    with pytest.raises(ImportError, match=message):
      write(tmp_path, [1], **kwargs)


def test_files_stay_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(metric_writers, "_MAX_BYTES", 3000)
  with metric_writers.open_writers(tmp_path) as writers:
    for step in range(1, 400):
      writers.write(step, {"loss_lm": 1.0, "validation_loss_lm": 2.0})
  lines = [record["step"] for record in metric_writers.read_records(tmp_path)]
  assert lines == list(range(lines[0], 400)) and 40 < len(lines) < 140
  assert sum(f.stat().st_size for f in tmp_path.glob("metrics*")) < 6200
  assert sum(f.stat().st_size for f in (tmp_path / "tensorboard").iterdir()) < 12_000
  for _ in range(40):  # each process writes a little
    with metric_writers.open_writers(tmp_path, step=400) as writers:
      for step in range(401, 408):
        writers.write(step, {"loss_lm": 1.0})
  assert sum(f.stat().st_size for f in (tmp_path / "tensorboard").iterdir()) < 8000
  with metric_writers.open_writers(
    tmp_path, step=lines[-20]
  ) as writers:  # what came later is forgotten
    writers.write(1000, {"loss_lm": 1.0})
  assert [record["step"] for record in metric_writers.read_records(tmp_path)] == [
    *lines[:-19],
    1000,
  ]


def test_a_validation_is_recorded_once(tmp_path):
  for _ in range(2):  # the process died before it noted that there was one
    with metric_writers.open_writers(tmp_path, step=4, tensorboard=False) as writers:
      writers.write(4, {"validation_loss_lm": 2.0})
  record_of = [r for r in metric_writers.read_records(tmp_path) if r["step"] == 4]
  assert record_of == [{"step": 4, "validation_loss_lm": 2.0}]
