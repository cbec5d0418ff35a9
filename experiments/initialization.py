"""Reads the model that a new run starts from (--init): from another run or an exported file."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import pathlib

import jax

import tvq_haiku as tvq
from tvq_haiku import language_model
from tvq_haiku.checkpoint import checkpoints, export, run_directory
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.model import parameters
from tvq_haiku.parallel import multihost
from tvq_haiku.types import Params
from tvq_haiku.utils import progress


def read_config(init: str) -> tvq.TransformerConfig:
  """Returns the configuration of the model that --init names.

  Args:
    init: directory of a run, or file or directory of exported parameters.

  Raises:
    ValueError: it is neither.
  """
  path = pathlib.Path(init)
  with _naming_flag(init):
    if not path.exists():
      raise ValueError(
        "it does not exist. Expected: the directory of a run, or a file that --command=export "
        "wrote."
      )
    file = export.exported_file(path)
    return run_directory.load_config(path)[0] if file is None else export.read_config(file)


def find_vocabulary(init: str) -> pathlib.Path | None:
  """Returns the SentencePiece vocabulary of this model, or None if its tokens are bytes.

  It is looked for in the directory of the run, or in that of the exported file.

  Args:
    init: directory of a run, or file or directory of exported parameters.

  Raises:
    ValueError: there is no such model, or its vocabulary cannot be found.
  """
  config, file = read_config(init), language_model.vocabulary_file(pathlib.Path(init))
  if file is None and config.n_vocab != ByteVocabulary.SIZE:
    raise ValueError(
      f"--init={init}: the model has n_vocab={config.n_vocab}, but no "
      f"{run_directory.VOCABULARY_FILE} lies beside it: set --vocab to its vocabulary."
    )
  return file


def load_params(init: str, config: tvq.TransformerConfig, *, weights: str) -> Params:
  """Loads the parameters of this model, and logs what was loaded.

  Args:
    init: directory of a run, or file or directory of exported parameters.
    config: configuration of the new run's model.
    weights: which checkpoint of a run: see `checkpoints.load_run`.

  Raises:
    ValueError: the parameters cannot be loaded, or do not fit the configuration.
  """
  path, origin = pathlib.Path(init), ""
  with _naming_flag(init):
    file = export.exported_file(path)
    if file is None:
      if not multihost.is_single_process():
        raise ValueError(
          "several processes can only start from a file: write it with --command=export."
        )
      run = checkpoints.load_run(path, weights=weights)
      # Arrays of the host can be put on any device; loaded arrays are bound to the first one.
      params, saved = jax.device_get(run.train_state.params), run.config
      origin = f", after {int(run.train_state.step):,} updates"
    else:
      params, saved = export.import_params(file)
    parameters.check_params(params, config)
  n_param = sum(x.size for x in jax.tree.leaves(params))
  changes = [
    f"{field.name}={getattr(config, field.name)} instead of {getattr(saved, field.name)}"
    for field in dataclasses.fields(config)
    if getattr(config, field.name) != getattr(saved, field.name)
  ]
  if multihost.is_main_process():
    progress.log(
      f"starting from {init}{origin}: {n_param:,} parameters and the configuration of the model"
      + (f", with {', '.join(changes)}" if changes else "")
    )
  return params


@contextlib.contextmanager
def _naming_flag(init: str) -> Iterator[None]:
  """Puts the flag and its value before the message of an error."""
  try:
    yield
  except (OSError, ValueError) as error:
    raise ValueError(f"--init={init}: {error}") from error
