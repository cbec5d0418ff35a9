"""The file data.json of a run: statistics of the splits that it is trained and validated on.

A run must be resumed with the data, and used with the vocabulary, that it was started with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import Any, TypeVar

from tvq_haiku.checkpoint import run_directory
from tvq_haiku.data.token_cache import Split, SplitStatistics
from tvq_haiku.data.vocabulary import Vocabulary
from tvq_haiku.utils import files

Value = TypeVar("Value")

_FILE = "data.json"
_IDENTITY = ("vocabulary", "n_byte", "n_token", "checksum")  # fields that identify a split


def save_statistics(workdir: pathlib.Path, splits: Mapping[str, Split]) -> None:
  """Writes the statistics of the splits, by name, to data.json."""
  statistics = {name: dataclasses.asdict(split.statistics) for name, split in splits.items()}
  files.write_atomically(workdir / _FILE, json.dumps(statistics, indent=1))


def check_same_data(workdir: pathlib.Path, splits: Mapping[str, Split]) -> None:
  """Raises a CheckpointError that names the differences unless the run was started on `splits`."""
  differences = []
  for name, saved in _load_identities(workdir).items():
    for field in _IDENTITY:
      value = getattr(splits[name].statistics, field)
      if saved[field] != value:
        differences.append(f"{name} {field} is {saved[field]!r} in the run, {value!r} here")
  if differences:
    raise run_directory.CheckpointError(
      f"data mismatch with the run in {workdir}: {'; '.join(differences)}. Use the data of the "
      "run, or another directory (--workdir), where --init starts from the parameters of this run: "
      f"--init={workdir}."
    )


def check_vocabulary(workdir: pathlib.Path, vocabulary: Vocabulary) -> None:
  """Raises a CheckpointError unless the run was trained with `vocabulary`."""
  for identity in _load_identities(workdir).values():
    if identity["vocabulary"] != vocabulary.fingerprint:
      raise run_directory.CheckpointError(
        f"vocabulary mismatch with the run in {workdir}: it is {identity['vocabulary']} in the "
        f"run, {vocabulary.fingerprint} here. Leave --vocab out to use the vocabulary of the run."
      )


def is_data_of_run(
  workdir: pathlib.Path, split_name: str, open_split: Callable[[str], Split]
) -> bool:
  """Returns whether a dataset is the one that the run was started on.

  Args:
    workdir: directory of the run.
    split_name: the split that matters. The validation split decides instead if the run has no
      statistics of this one, as for the test split.
    open_split: opens a split of the dataset.
  """
  saved = _load_identities(workdir)
  name = split_name if split_name in saved else "validation"
  if name not in saved:
    return False
  try:
    statistics = open_split(name).statistics
  except ValueError:  # the split is empty, which it was not when the run was started
    return False
  return all(saved[name][field] == getattr(statistics, field) for field in _IDENTITY)


def load_statistics(workdir: pathlib.Path) -> dict[str, SplitStatistics]:
  """Returns the statistics in data.json, by split; empty if there is no file.

  Raises:
    CheckpointError: the file is damaged.
  """
  return _read(workdir, lambda split: SplitStatistics(**split))


def _load_identities(workdir: pathlib.Path) -> dict[str, dict[str, str | int]]:
  """Returns the identifying fields of each split in data.json; empty if there is no file."""
  return _read(workdir, lambda split: {field: split[field] for field in _IDENTITY})


def _read(workdir: pathlib.Path, parse: Callable[[Mapping[str, Any]], Value]) -> dict[str, Value]:
  """Returns the content of data.json, by split; empty if there is no file.

  Args:
    workdir: directory of the run.
    parse: called with the statistics of each split.

  Raises:
    CheckpointError: the file is damaged.
  """
  file = workdir / _FILE
  try:
    statistics = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: parse(split) for name, split in statistics.items()}
  except (AttributeError, LookupError, TypeError, ValueError) as error:
    raise run_directory.CheckpointError(
      f"{file} is damaged. Remove it to continue without checking the training data."
    ) from error
