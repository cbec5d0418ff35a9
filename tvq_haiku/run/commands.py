"""The commands of an experiment: train it, and evaluate it on a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import pathlib
from typing import Any

from tvq_haiku.checkpoint import checkpoints, export, run_directory
from tvq_haiku.data import packing, token_cache
from tvq_haiku.data.sentencepiece_vocabulary import PieceVocabulary
from tvq_haiku.data.sources import base
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import data_statistics, metric_writers, run_record, trainer
from tvq_haiku.run.experiment import Experiment
from tvq_haiku.types import Params
from tvq_haiku.utils import files


def train(
  experiment: Experiment,
  *,
  params: Params | None = None,
  validate_tokens: int | None = None,
  tensorboard: bool = True,
  wandb: str | None = None,
  options: trainer.TrainerOptions | None = None,
) -> checkpoints.Checkpoint:
  """Trains an experiment, or resumes it, and keeps its last and its best checkpoint.

  Args:
    experiment: the experiment.
    params: parameters to initialize a new run from; None: random parameters.
    validate_tokens: maximum number of tokens that a validation reads; None: the complete split.
    tensorboard: whether to write TensorBoard event files.
    wandb: Weights & Biases project to send the metrics to; None: don't send them.
    options: options of the training loop; None: the defaults. The experiment determines
      `token_name`.

  Returns:
    The last checkpoint; it has fewer updates than `n_update` if the run was stopped by a signal.

  Raises:
    CheckpointError: the directory holds a run with a different configuration, seed or dataset, or
      another process trains in it.
    NumericalError: `max_skipped` consecutive updates were skipped.
    ValueError: the data is damaged, or too small for one batch.
    OSError: a file cannot be written.
  """
  e, workdir = experiment, files.prepare_directory(experiment.workdir)
  with lock(workdir), contextlib.ExitStack() as stack:
    is_resumed = run_directory.has_checkpoint(workdir)
    if is_resumed:
      run_directory.check_same_run(workdir, e.config, e.train_cfg)
    splits = {name: e.open_split(name) for name in ("train", "validation")}
    batches = _training_batches(e, splits["train"])
    if is_resumed:
      data_statistics.check_same_data(workdir, splits)
    checkpoint = trainer.resume_or_initialize(
      e.config, e.train_cfg, workdir, seed=e.seed, mesh=e.mesh, params=params
    )
    record = None
    if multihost.is_main_process():
      _save_inputs(e, workdir, splits)
      writers = metric_writers.open_writers(
        workdir,
        step=int(checkpoint.train_state.step),
        tensorboard=tensorboard,
        wandb=wandb,
        settings=dataclasses.asdict(e.config) | dataclasses.asdict(e.train_cfg),
      )
      record = stack.enter_context(writers).write
    return trainer.fit(
      e.config,
      e.train_cfg,
      batches,
      workdir,
      seed=e.seed,
      mesh=e.mesh,
      checkpoint=checkpoint,
      record=record,
      validate=lambda params, stop: e.measure_split(
        params, e.config, splits["validation"], max_tokens=validate_tokens, stop=stop, mesh=e.mesh
      ),
      options=dataclasses.replace(
        options or trainer.TrainerOptions(), token_name=experiment.token_name
      ),
    )


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
  """Prevents other runs from training in the directory; process 0 of the run holds the lock.

  Raises:
    CheckpointError: another run trains in the directory.
  """
  with contextlib.ExitStack() as stack:
    if multihost.is_main_process():
      try:
        stack.enter_context(files.lock(workdir / ".lock", wait=False))
      except BlockingIOError as error:
        raise run_directory.CheckpointError(
          f"another process trains in {workdir}. Wait until it ends, or use another directory "
          "(--workdir)."
        ) from error
    yield


def _training_batches(experiment: Experiment, split: token_cache.Split) -> packing.PackedBatches:
  """Returns this process's share of the training batches."""
  train_cfg = experiment.train_cfg
  host, n_host = sharding.process_share(experiment.mesh, train_cfg.global_batch_size)
  return packing.PackedBatches(
    split.stream,
    batch_size=train_cfg.global_batch_size,
    sequence_len=train_cfg.sequence_len,
    seed=experiment.seed,
    aligned=experiment.image_size is not None,
    host=host,
    n_host=n_host,
  )


def _save_inputs(
  experiment: Experiment, workdir: pathlib.Path, splits: Mapping[str, token_cache.Split]
) -> None:
  """Saves what later commands need to know of the experiment, and statistics of its data."""
  run_record.write_record(
    workdir,
    run_record.RunRecord(experiment.name, experiment.image_size, experiment.top_p),
  )
  if isinstance(experiment.vocabulary, PieceVocabulary):
    files.write_atomically(workdir / run_directory.VOCABULARY_FILE, experiment.vocabulary.model)
  data_statistics.save_statistics(workdir, splits)


def evaluate(
  experiment: Experiment,
  checkpoint: checkpoints.Checkpoint,
  split_name: str,
  *,
  weights: str | None = None,
) -> tuple[dict[str, Any], pathlib.Path]:
  """Computes the metrics of a checkpoint on a complete split, and writes them to a file.

  Args:
    experiment: the experiment of the checkpoint.
    checkpoint: the checkpoint.
    split_name: "train", "validation" or "test".
    weights: which checkpoint of the run it is, for the file; None: not known.

  Returns:
    The metrics and the file: SPLIT.figures.json for the data of the run; for other data, a name
    that contains the name and the checksum of the data. The metrics are `loss_lm` in nats per
    token, the measures of the experiment, the `step` of the checkpoint, the numbers of `tokens` and
    `bytes` of the split, and the number of `rows`: parts of the split that were read in parallel.
    `split`, `data` (a path), `checksum` and `weights` tell what was measured.

  Raises:
    CheckpointError: the run was trained with a different vocabulary.
    ValueError: the tokens are damaged.
  """
  data_statistics.check_vocabulary(experiment.workdir, experiment.vocabulary)
  split = experiment.open_split(split_name)
  token_cache.verify(split)
  metrics = experiment.measure_split(checkpoint.train_state.params, checkpoint.config, split)
  data_dir = experiment.data_dir
  metrics |= {
    "split": split_name,
    "data": None if data_dir is None else str(data_dir.absolute()),
    "checksum": split.statistics.checksum,
    "weights": weights,
    "step": int(checkpoint.train_state.step),
    "tokens": split.statistics.n_token,
    "bytes": split.statistics.n_byte,
    "rows": experiment.eval_rows,
  }
  file = _figures_file(experiment, split_name, split.statistics.checksum)
  content = json.dumps(metric_writers.finite(metrics), indent=1)
  files.write_atomically(file, content + "\n")
  return metrics, file


def _figures_file(experiment: Experiment, split_name: str, checksum: int) -> pathlib.Path:
  """Returns the file for the metrics of a split; different data have different files.

  Args:
    experiment: the experiment.
    split_name: name of the split.
    checksum: checksum of its tokens.
  """
  file = experiment.workdir / f"{split_name}.figures.json"
  if data_statistics.is_data_of_run(experiment.workdir, split_name, experiment.open_split):
    try:
      written = json.loads(file.read_text(encoding="utf-8"))["checksum"]
    except (OSError, LookupError, TypeError, ValueError):
      written = checksum  # there is no such file, or it does not name its data
    if written == checksum:
      return file
  name = "data" if experiment.data_dir is None else base.data_name(experiment.data_dir)
  return experiment.workdir / f"{split_name}-{name}-{checksum:08x}.figures.json"


def export_params(workdir: pathlib.Path, checkpoint: checkpoints.Checkpoint) -> pathlib.Path:
  """Writes the parameters and the configuration of a checkpoint to one file; returns its path."""
  file = workdir / export.PARAMS_FILE
  export.export_params(checkpoint.train_state.params, checkpoint.config, file)
  return file
