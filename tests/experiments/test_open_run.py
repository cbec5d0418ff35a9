"""Opening the runs of all experiments."""

import shutil

import pytest

from experiments import open_run
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.run import run_record


@pytest.fixture
def books(saved_runs):
  """The directory of a run of books."""
  return saved_runs["books"].directory


def test_run_is_opened_with_its_vocabulary_and_its_record(books):
  run = open_run.open_run(books, weights="best")
  vocabulary = data.PieceVocabulary(books / "vocab.model")
  assert run.model.vocabulary.fingerprint == vocabulary.fingerprint
  assert run.record == run_record.RunRecord("small-books", None, 0.7)
  assert (run.directory, run.n_update) == (books, 8)


def test_best_checkpoint_has_the_vocabulary_and_the_record_of_its_run(books, tmp_path):
  run_directory = shutil.copytree(books, tmp_path / "run")
  (run_directory / "best").mkdir()
  shutil.move(run_directory / "checkpoints", run_directory / "best" / "checkpoints")
  shutil.copy(run_directory / "config.json", run_directory / "best")
  run = open_run.open_run(run_directory / "best", weights="best")
  assert run.directory == run_directory and run.record.name == "small-books"
  assert run.model.vocabulary.size == 330
  assert open_run.open_run(run_directory, weights="best").n_update == 8


def test_vocabulary_that_does_not_fit_is_refused(books):
  with pytest.raises(ValueError, match=r"--workdir=.*n_vocab=330, not the 259"):
    open_run.open_run(books, weights="best", vocabulary=data.ByteVocabulary)


def test_missing_run_is_named(tmp_path):
  with pytest.raises(tvq.CheckpointError, match=r"nowhere holds no checkpoint"):
    open_run.open_run(tmp_path / "nowhere", weights="last")
