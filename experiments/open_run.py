"""Opens a training run, of any experiment, to use its model."""

from __future__ import annotations

from collections.abc import Mapping
import os
import pathlib
from typing import Any, NamedTuple

import tvq_haiku as tvq
from tvq_haiku import language_model
from tvq_haiku.checkpoint import checkpoints
from tvq_haiku.data.sentencepiece_vocabulary import PieceVocabulary
from tvq_haiku.data.vocabulary import Vocabulary
from tvq_haiku.run import data_statistics, run_record


class OpenRun(NamedTuple):
  """The model of a run, and what is known of the run."""

  model: tvq.LanguageModel
  record: run_record.RunRecord
  directory: pathlib.Path  # of the run
  n_update: int  # updates of the model


def open_run(
  workdir: str | os.PathLike,
  *,
  weights: str,
  vocabulary: Vocabulary | None = None,
  changes: Mapping[str, Any] | None = None,
) -> OpenRun:
  """Loads the model of a run with its vocabulary.

  Args:
    workdir: directory of the run.
    weights: "best" or "last", see `checkpoints.load_run`.
    vocabulary: the vocabulary, which must be that of the run; None: it is read from the run.
    changes: fields of the model configuration to change, such as `precision`.

  Raises:
    CheckpointError: there is no checkpoint, or it is damaged, or the vocabulary is not that of the
      run.
    ValueError: the vocabulary does not fit the model, or the model does not predict text.
  """
  checkpoint = checkpoints.load_run(workdir, weights=weights, changes=changes)
  directory = run_record.directory_of_run(workdir)
  params, config = checkpoint.train_state.params, checkpoint.config
  try:
    if vocabulary is None and (file := language_model.vocabulary_file(directory)):
      vocabulary = PieceVocabulary(file)
    model = tvq.LanguageModel(params, config, vocabulary=vocabulary)
  except ValueError as error:
    raise ValueError(f"--workdir={workdir}: {error}") from error
  data_statistics.check_vocabulary(directory, model.vocabulary)
  n_update = int(checkpoint.train_state.step)
  return OpenRun(model, run_record.read_record(directory), directory, n_update)
