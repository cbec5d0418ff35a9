"""Metrics are written once, even if a process dies, and the size of the files is bounded."""

import errno
import os
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from tvq_haiku.run import metric_writers


def write(workdir, steps, **kwargs):
  """Writes one set of metrics per step, as one process of a run."""
  with metric_writers.open_writers(workdir, **kwargs) as writers:
    for step in steps:
      writers.write(step, {"loss_lm": step / 10})


def steps_of(workdir):
  return [record["step"] for record in metric_writers.read_records(workdir)]


class TestJsonl:
  def test_written_metrics_are_read_back(self, tmp_path):
    write(tmp_path, [10, 20], tensorboard=False)
    assert metric_writers.read_records(tmp_path) == [
      {"step": 10, "loss_lm": 1.0},
      {"step": 20, "loss_lm": 2.0},
    ]
    assert not (tmp_path / "tensorboard").exists()

  def test_directory_without_metrics_has_no_records(self, tmp_path):
    assert metric_writers.read_records(tmp_path) == []

  def test_resumed_run_discards_later_steps(self, tmp_path):
    write(tmp_path, [10, 20, 30], tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
      file.write('{"step": 40, "los')  # the process died while it wrote
    write(tmp_path, [], step=20, tensorboard=False)
    assert steps_of(tmp_path) == [10, 20]
    write(tmp_path, [30, 40], step=20, tensorboard=False)
    assert steps_of(tmp_path) == [10, 20, 30, 40]

  def test_incomplete_line_that_parses_is_not_a_record(self, tmp_path):
    write(tmp_path, [1], tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
      file.write("12")
    assert steps_of(tmp_path) == [1]
    write(tmp_path, [2], step=1, tensorboard=False)
    assert steps_of(tmp_path) == [1, 2]

  def test_line_without_a_line_break_does_not_damage_the_next_one(self, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss_lm": 0.1}')
    write(tmp_path, [2], step=1, tensorboard=False)
    assert steps_of(tmp_path) == [2]

  def test_non_finite_values_are_null(self, tmp_path):
    with metric_writers.open_writers(tmp_path, tensorboard=False) as writers:
      writers.write(1, {"loss_lm": float("nan"), "word_perplexity": float("inf"), "x": 1.0})
    assert metric_writers.read_records(tmp_path) == [
      {"step": 1, "loss_lm": None, "word_perplexity": None, "x": 1.0},
    ]

  def test_validation_is_written_once(self, tmp_path):
    """The process died before it recorded in validation.json that the validation is done."""
    for _ in range(2):
      with metric_writers.open_writers(tmp_path, step=4, tensorboard=False) as writers:
        writers.write(4, {"validation_loss_lm": 2.0})
    assert metric_writers.read_records(tmp_path) == [{"step": 4, "validation_loss_lm": 2.0}]

  def test_validation_and_training_of_one_step_are_both_written(self, tmp_path):
    write(tmp_path, [4], tensorboard=False)
    with metric_writers.open_writers(tmp_path, step=4, tensorboard=False) as writers:
      writers.write(4, {"validation_loss_lm": 2.0})
    assert steps_of(tmp_path) == [4, 4]

  def test_files_stay_bounded(self, tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writers, "_MAX_BYTES", 3000)
    write(tmp_path, range(1, 400), tensorboard=False)
    steps = steps_of(tmp_path)
    assert steps == list(range(steps[0], 400)) and 80 < len(steps) < 250
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["metrics-older.jsonl", "metrics.jsonl"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 6200
    write(tmp_path, [1000], step=steps[-100], tensorboard=False)  # the older file is shortened, too
    assert steps_of(tmp_path) == [*steps[:-99], 1000]


def read_events(workdir):
  """Returns (step, name, value) of each scalar, and (step, None, None) of each session start."""
  events = []
  for file in sorted((workdir / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
    content = file.read_bytes()
    while content:  # length (8 bytes), its checksum (4), the event, its checksum (4)
      n = int.from_bytes(content[:8], "little")
      event = event_pb2.Event.FromString(content[12 : 12 + n])
      content = content[16 + n :]
      events += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
      if event.session_log.status == event_pb2.SessionLog.START:
        events.append((event.step, None, None))
  return events


class TestTensorBoard:
  def test_resumed_run_discards_later_steps(self, tmp_path):
    for step in (0, 0, 20):
      write(tmp_path, [step + 10], step=step)
    assert read_events(tmp_path) == [
      (10, "loss_lm", 1.0),
      (1, None, None),
      (10, "loss_lm", 1.0),
      (21, None, None),
      (30, "loss_lm", 3.0),
    ]

  def test_full_disk_is_an_error(self, tmp_path, monkeypatch):
    """The writer must raise an error, and not wait until there is space."""

    def fail(descriptor):
      raise OSError(errno.ENOSPC, "No space left on device")

    with metric_writers.open_writers(tmp_path) as writers:
      writers.write(1, {"loss_lm": 1.0})
      with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)  # flushes event files
        with pytest.raises(OSError, match=r"cannot write metrics to .*: No space left"):
          writers.write(2, {"loss_lm": 1.0})

  def test_files_of_one_process_stay_bounded(self, tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writers, "_MAX_BYTES", 3000)
    write(tmp_path, range(1, 400))
    sizes = [path.stat().st_size for path in (tmp_path / "tensorboard").iterdir()]
    assert len(sizes) > 1 and sum(sizes) < 12_000
    assert read_events(tmp_path)[-1][0] == 399

  def test_files_of_many_processes_stay_bounded(self, tmp_path, monkeypatch):
    monkeypatch.setattr(metric_writers, "_MAX_BYTES", 3000)
    for i in range(40):
      write(tmp_path, range(7 * i + 1, 7 * i + 8), step=7 * i)
    assert sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir()) < 8000
    assert read_events(tmp_path)[-1][0] == 280


@pytest.fixture
def wandb(monkeypatch):
  """Replaces the package `wandb` by one that only records the calls."""
  calls = types.SimpleNamespace(inits=[], logs=[], n_finished=0)

  class Run:
    def log(self, metrics, step):
      calls.logs.append((step, metrics))

    def finish(self):
      calls.n_finished += 1

  module = types.ModuleType("wandb")
  module.init = lambda **kwargs: calls.inits.append(kwargs) or Run()
  monkeypatch.setitem(sys.modules, "wandb", module)
  return calls


class TestWandb:
  def test_service_is_not_called_by_default(self, tmp_path, wandb):
    write(tmp_path, [10], tensorboard=False)
    assert not wandb.inits and not (tmp_path / "wandb_id").exists()

  def test_resumed_run_continues_the_same_run(self, tmp_path, wandb):
    for steps in ([20], [30]):
      write(tmp_path, steps, step=10, tensorboard=False, wandb="novels", settings={"d_model": 8})
    assert wandb.logs == [(20, {"loss_lm": 2.0}), (30, {"loss_lm": 3.0})]
    assert wandb.n_finished == 2
    first, second = wandb.inits
    assert first == second and first["id"] == (tmp_path / "wandb_id").read_text()
    assert len(first["id"]) == 8 and first["resume"] == "allow"
    assert first["project"] == "novels" and first["config"] == {"d_model": 8}


@pytest.mark.parametrize(
  "kwargs, message",
  [
    (dict(), r"tensorboardX.*tvq_haiku\[train\]"),
    (dict(tensorboard=False, wandb="novels"), r"wandb.*tvq_haiku\[wandb\]"),
  ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, kwargs, message):
  def fail(name):
    raise ModuleNotFoundError(name)

  monkeypatch.setattr("importlib.import_module", fail)
  with pytest.raises(ImportError, match=message):
    write(tmp_path, [1], **kwargs)
