"""The progress line, the warnings and the metrics of a training run."""

import math

import numpy as np
import pytest

from tvq_haiku.evaluation import flops
from tvq_haiku.run import reporter, trainer_options

import helpers

CONFIG, TRAIN = helpers.RUN, helpers.RUN_TRAINING
TOKENS_PER_STEP = 64


class Recorder:
  """A reporter with lists of all notes that it showed and of all metrics that it recorded."""

  def __init__(self, **options):
    self.shown, self.records = [], []
    self.reporter = reporter.Reporter(
      CONFIG,
      TRAIN,
      trainer_options.TrainerOptions(**options),
      lambda update, note="": self.shown.append((update, note)),
      lambda update, metrics: self.records.append((update, dict(metrics))),
    )

  def report(self, update, losses, skipped=(0.0, 0.0), *, record=True):
    metrics = {name: np.array(losses) for name in ("loss", "loss_lm", "grad_norm")}
    metrics["skipped"] = np.array(skipped)
    self.reporter.report_batch(update, metrics, record=record)


@pytest.fixture
def clock(monkeypatch):
  """A clock that changes only when a test sets it."""
  seconds = [0.0]
  monkeypatch.setattr("time.monotonic", lambda: seconds[0])
  return seconds


def test_batches_are_reported_one_batch_late():
  recorder = Recorder()
  recorder.report(2, [1.0, 3.0])
  assert recorder.shown == [(2, "compiled")] and not recorder.records
  recorder.report(4, [5.0, 5.0])
  assert recorder.records == [
    (2, {"loss": 2.0, "loss_lm": 2.0, "grad_norm": 2.0, "skipped": 0.0, "skipped_since_start": 0})
  ]
  recorder.reporter.flush()
  recorder.reporter.flush()  # has nothing left to report
  assert [(update, record["loss_lm"]) for update, record in recorder.records] == [
    (2, 2.0),
    (4, 5.0),
  ]


def test_batches_are_recorded_on_demand_and_always_shown():
  recorder = Recorder()
  recorder.report(2, [1.0, 1.0], record=False)
  recorder.reporter.flush()
  assert not recorder.records and recorder.shown[-1][0] == 2


def test_progress_shows_a_moving_average_in_bits():
  recorder = Recorder(token_name="byte")
  recorder.report(2, [math.log(2), 3 * math.log(2)])
  recorder.reporter.flush()
  assert recorder.shown[-1] == (2, f"{0.95 + 0.05 * 3:.3f} bits per byte")


def test_speed_is_measured_from_record_to_record(clock):
  """The time of the first batch, which compiles, and of validations is not counted."""
  recorder = Recorder()
  for seconds in (100.0, 1.0, 1.0, 4.0):
    recorder.report(2, [1.0, 1.0])
    clock[0] += seconds
    recorder.reporter.flush()
  clock[0] += 50.0  # a validation
  recorder.reporter.restart_clock()
  recorder.report(2, [1.0, 1.0])
  clock[0] += 2.0
  recorder.reporter.flush()
  speeds = [record.get("tokens_per_second") for _, record in recorder.records]
  assert speeds == [None, *(TOKENS_PER_STEP / seconds for seconds in (1.0, 1.0, 4.0, 2.0))]
  flops_per_second = speeds[-1] * flops.training_flops(CONFIG, TRAIN.sequence_len)
  np.testing.assert_allclose(recorder.records[-1][1]["flops_per_second"], flops_per_second)
  assert "  32 tokens/s" in recorder.shown[-1][1]


def test_speed_between_two_records_covers_all_batches(clock):
  recorder = Recorder()
  recorder.report(2, [1.0, 1.0])
  for update, seconds in ((4, 1.0), (6, 2.0), (8, 3.0)):
    recorder.report(update, [1.0, 1.0], record=update == 8)
    clock[0] += seconds
  recorder.reporter.flush()
  assert recorder.records[-1][1]["tokens_per_second"] == 3 * TOKENS_PER_STEP / 6.0


def test_skipped_updates_are_counted_and_logged(capsys):
  recorder = Recorder()
  nan = math.nan
  for update, losses, skipped in (
    (2, [1.0, nan], [0.0, 1.0]),
    (4, [nan, nan], [1.0, 1.0]),
  ):
    recorder.report(update, losses, skipped)
  recorder.reporter.flush()
  assert recorder.reporter.skipped == recorder.reporter.skipped_in_a_row == 3
  assert recorder.reporter.last_skipped == 4
  recorder.report(6, [nan, 1.0], [1.0, 0.0])
  recorder.reporter.flush()
  assert recorder.reporter.skipped == 4 and recorder.reporter.skipped_in_a_row == 0
  assert recorder.reporter.last_skipped == 5
  assert capsys.readouterr().err.splitlines() == [
    f"warning: update {i} is skipped: loss nan, grad_norm nan" for i in (2, 3, 4, 5)
  ]
  assert recorder.shown[-1][1].endswith("4 updates skipped")
  assert [record["skipped_since_start"] for _, record in recorder.records] == [1, 3, 4]


def test_loss_of_skipped_updates_is_left_out_of_the_average():
  recorder = Recorder()
  recorder.report(2, [math.nan, math.nan], [1.0, 1.0])
  recorder.reporter.flush()
  assert recorder.shown[-1][1].startswith("nan bits per token")
  recorder.report(4, [math.nan, math.log(2)], [1.0, 0.0])
  recorder.reporter.flush()
  assert recorder.shown[-1][1].startswith("1.000 bits per token")


def test_validation_is_recorded_and_stays_in_the_progress_line():
  recorder = Recorder()
  recorder.reporter.report_validation(4, {"loss_lm": 2 * math.log(2), "bits_per_byte": 1.5})
  assert recorder.records == [
    (4, {"validation_loss_lm": 2 * math.log(2), "validation_bits_per_byte": 1.5})
  ]
  for update in (6, 8):
    recorder.report(update, [1.0, 1.0])
    recorder.reporter.flush()
    assert "  validation 1.5000 bits per byte" in recorder.shown[-1][1]
