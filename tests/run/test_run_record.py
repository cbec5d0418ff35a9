"""The record of a run's experiment."""

import pytest

import tvq_haiku as tvq
from tvq_haiku.run import run_record
from tvq_haiku.run.run_record import RunRecord


def test_round_trip(tmp_path):
  for record in (RunRecord("pg19", None, 0.8), RunRecord("imagenet64", 64, 0.999)):
    run_record.write_record(tmp_path, record)
    assert run_record.read_record(tmp_path) == record


def test_run_without_a_record_is_one_of_text(tmp_path):
  assert run_record.read_record(tmp_path) == RunRecord(None, None, 0.95)


@pytest.mark.parametrize(
  "text", ["", "{", "[]", '{"unknown": 1}', '{"image_size": 0}', '{"image_size": "big"}']
)
def test_damaged_record_is_named(tmp_path, text):
  (tmp_path / "experiment.json").write_text(text)
  with pytest.raises(tvq.CheckpointError, match=r"experiment\.json is damaged: .* Remove it"):
    run_record.read_record(tmp_path)


def test_best_checkpoint_belongs_to_the_run_above_it(tmp_path):
  (tmp_path / "best").mkdir()
  assert run_record.directory_of_run(tmp_path / "best") == tmp_path / "best"  # not a run
  (tmp_path / "config.json").touch()
  assert run_record.directory_of_run(tmp_path / "best") == tmp_path
  assert run_record.directory_of_run(tmp_path) == tmp_path
