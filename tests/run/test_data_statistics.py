"""The statistics of the training data in data.json, against which resumed runs are checked."""

import dataclasses
import json

import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data.token_cache import Split, SplitStatistics
from tvq_haiku.run import data_statistics

STATISTICS = SplitStatistics(
  n_document=1,
  n_byte=90,
  n_word=20,
  n_token=90,
  unigram_entropy=4.0,
  checksum=7,
  vocabulary="bytes",
  dtype="|u1",
  offset=3,
)
OTHER_STATISTICS = dataclasses.replace(STATISTICS, checksum=8)


def splits(**changes):
  statistics = dataclasses.replace(STATISTICS, **changes)
  return {
    "train": Split(data.stream_of([np.arange(3, 93)]), statistics),
    "validation": Split(data.stream_of([np.arange(3, 93)]), STATISTICS),
  }


def test_file_holds_all_statistics(tmp_path):
  data_statistics.save_statistics(tmp_path, splits())
  saved = json.loads((tmp_path / "data.json").read_text())
  assert saved.keys() == {"train", "validation"}
  assert SplitStatistics(**saved["train"]) == STATISTICS


def test_same_data_is_accepted(tmp_path):
  data_statistics.save_statistics(tmp_path, splits())
  data_statistics.check_same_data(tmp_path, splits())
  data_statistics.check_vocabulary(tmp_path, data.ByteVocabulary)


@pytest.mark.parametrize(
  "field, value", [("n_byte", 91), ("n_token", 91), ("checksum", 8), ("vocabulary", "other")]
)
def test_other_data_is_rejected_and_the_difference_is_named(tmp_path, field, value):
  data_statistics.save_statistics(tmp_path, splits())
  message = f"train {field} is {getattr(STATISTICS, field)!r} in the run, {value!r} here. Use"
  with pytest.raises(tvq.CheckpointError, match=f"data mismatch with the run in .*: {message}"):
    data_statistics.check_same_data(tmp_path, splits(**{field: value}))


def test_counts_that_do_not_identify_the_data_may_differ(tmp_path):
  data_statistics.save_statistics(tmp_path, splits())
  data_statistics.check_same_data(tmp_path, splits(n_word=21, unigram_entropy=4.1))


def test_another_vocabulary_is_rejected(tmp_path):
  data_statistics.save_statistics(tmp_path, splits(vocabulary="pieces-330-aa"))
  with pytest.raises(
    tvq.CheckpointError, match=r"it is pieces-330-aa in the run, bytes here\. Leave --vocab out"
  ):
    data_statistics.check_vocabulary(tmp_path, data.ByteVocabulary)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_data_of_the_run_are_recognized(tmp_path, split):
  """The test split, of which there are no statistics, is judged by the validation split."""
  is_own = lambda opened: data_statistics.is_data_of_run(tmp_path, split, opened.__getitem__)
  assert not is_own(splits())  # nothing is known about the run
  data_statistics.save_statistics(tmp_path, splits())
  assert is_own(splits())
  other = {name: Split(split.stream, OTHER_STATISTICS) for name, split in splits().items()}
  assert not is_own(other)


def test_data_with_an_empty_split_are_not_those_of_the_run(tmp_path):
  data_statistics.save_statistics(tmp_path, splits())

  def open_split(name):
    raise ValueError(f"the split {name!r} is empty")

  assert not data_statistics.is_data_of_run(tmp_path, "test", open_split)


def test_all_statistics_can_be_loaded(tmp_path):
  assert data_statistics.load_statistics(tmp_path) == {}
  data_statistics.save_statistics(tmp_path, splits(n_byte=91))
  loaded = data_statistics.load_statistics(tmp_path)
  assert loaded == {name: split.statistics for name, split in splits(n_byte=91).items()}


def test_missing_file_is_not_checked(tmp_path):
  data_statistics.check_same_data(tmp_path, splits())
  data_statistics.check_vocabulary(tmp_path, data.ByteVocabulary)


@pytest.mark.parametrize("text", ["", "[1]", "7", '"text"', '{"train": {}}', '{"train": 7}'])
def test_damaged_file_is_named(tmp_path, text):
  (tmp_path / "data.json").write_text(text)
  with pytest.raises(tvq.CheckpointError, match=r"data\.json is damaged\. Remove it to"):
    data_statistics.check_same_data(tmp_path, splits())
