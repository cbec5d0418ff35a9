"""Turns the flags of a command into configurations, paths, data, a vocabulary and an experiment."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import NamedTuple

from absl import flags
import jax

from experiments import config_flags, specs
from experiments.run_flags import RunFlags
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.data.sources import base
from tvq_haiku.data.vocabulary import Vocabulary
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.utils import progress


class Configs(NamedTuple):
  """A model and its training."""

  config: tvq.TransformerConfig
  train_cfg: tvq.TrainConfig


@dataclasses.dataclass(frozen=True)
class RunSetup:
  """A command's flags, with the preset and the paths that they select."""

  spec: specs.ExperimentSpec
  flags: RunFlags
  preset: specs.SizePreset
  workdir: pathlib.Path
  cache_dir: pathlib.Path | None  # of encoded data; None: the default directory
  vocab_file: pathlib.Path | None  # SentencePiece model, which may not exist yet; None: bytes


def make_setup(spec: specs.ExperimentSpec, run_flags: RunFlags) -> RunSetup:
  """Returns the setup of a command.

  Args:
    spec: the experiment.
    run_flags: the flags of the command.

  Raises:
    ValidationError: two flags contradict each other.
  """
  if run_flags.smoke and run_flags.data_dir is not None:
    raise flags.ValidationError("--smoke uses data of its own: do not set --data_dir.")
  if run_flags.vocab and specs.SENTENCEPIECE not in spec.vocabularies:
    raise flags.ValidationError(
      f"--vocab={run_flags.vocab}: the tokens of {spec.name} are bytes: do not set --vocab."
    )
  size = specs.SMOKE if run_flags.smoke else run_flags.size
  suffix = "" if size == specs.SIZES[0] else f"-{size}"
  workdir = pathlib.Path(run_flags.workdir or f"runs/{spec.name}{suffix}")
  vocab_file = _vocabulary_file(spec, run_flags.vocab, workdir)
  if vocab_file is None and run_flags.command == "train_vocab":
    raise flags.ValidationError(
      "--command=train_vocab: the tokens are bytes, so there is no vocabulary to train."
    )
  # A smoke run writes nothing outside of its working directory.
  cache_dir = workdir / "cache" if run_flags.smoke else None
  return RunSetup(
    spec=spec,
    flags=run_flags,
    preset=spec.presets[size],
    workdir=workdir,
    cache_dir=pathlib.Path(run_flags.cache_dir) if run_flags.cache_dir else cache_dir,
    vocab_file=vocab_file,
  )


def _vocabulary_file(
  spec: specs.ExperimentSpec, vocab: str | None, workdir: pathlib.Path
) -> pathlib.Path | None:
  """Returns the path of the SentencePiece model, or None if the tokens are bytes."""
  if vocab is not None:
    return None if vocab == specs.BYTES else pathlib.Path(vocab)
  file = workdir / run_directory.VOCABULARY_FILE
  return None if spec.vocabularies[0] == specs.BYTES and not file.exists() else file


def resolve_configs(setup: RunSetup) -> Configs:
  """Returns the configurations of the preset, changed by the --config flags.

  If --config.n_max_step shortens the training, the warm-up takes at most a tenth of it, unless
  --config.n_warmup_step is given.

  Raises:
    IllegalFlagValueError: the configurations would be invalid.
  """
  preset, train_changes = setup.preset, dict(setup.flags.train_changes)
  if "n_max_step" in train_changes:
    tenth = train_changes["n_max_step"] // 10
    train_changes.setdefault("n_warmup_step", min(preset.train_cfg.n_warmup_step, tenth))
  return Configs(
    config_flags.apply_changes(preset.config, setup.flags.model_changes),
    config_flags.apply_changes(preset.train_cfg, train_changes),
  )


def open_source(setup: RunSetup) -> base.Source:
  """Returns the data set in --data_dir, or with --smoke a small one, written to WORKDIR/data."""
  if setup.flags.smoke:
    return setup.spec.smoke_source(setup.workdir / "data")
  return setup.spec.source(setup.flags.data_dir)


def train_vocabulary(setup: RunSetup, source: base.SampledSource, n_vocab: int) -> pathlib.Path:
  """Trains a SentencePiece vocabulary on the training split and returns its file.

  Args:
    setup: the command's setup.
    source: the data set.
    n_vocab: number of tokens of the vocabulary.

  Raises:
    ValueError: the file exists.
  """
  if setup.vocab_file.exists():
    raise ValueError(f"{setup.vocab_file} exists already: remove it, or set a different --vocab.")
  lines = source.sample(setup.flags.vocab_bytes, seed=setup.flags.seed)
  progress.log(f"training a vocabulary of {n_vocab:,} tokens: {setup.vocab_file}")
  data.train_pieces(lines, setup.vocab_file, size=n_vocab)
  return setup.vocab_file


def open_vocabulary(setup: RunSetup, source: base.Source | None, n_vocab: int) -> Vocabulary:
  """Returns the vocabulary; --command=train first trains the default one if its file is missing.

  Args:
    setup: the command's setup.
    source: the data set to train a vocabulary on; only --command=train needs it.
    n_vocab: number of tokens of a vocabulary that is trained.

  Raises:
    ValueError: the file is missing and is not to be trained, or is not a SentencePiece model.
  """
  if setup.vocab_file is None:
    return data.ByteVocabulary
  if not multihost.is_main_process():
    multihost.barrier("vocabulary")  # waits until process 0 has written the file
  if not setup.vocab_file.exists():
    if setup.flags.vocab is not None or setup.flags.command != "train":
      raise ValueError(
        f"the vocabulary {setup.vocab_file} does not exist: --command=train_vocab trains it."
      )
    train_vocabulary(setup, source, n_vocab)
  if multihost.is_main_process():
    multihost.barrier("vocabulary")
  return data.PieceVocabulary(setup.vocab_file)


def make_experiment(setup: RunSetup, configs: Configs) -> experiment_lib.Experiment:
  """Opens the data and the vocabulary and returns the experiment.

  Args:
    setup: the command's setup.
    configs: the model and its training.
  """
  spec, run_flags = setup.spec, setup.flags
  source = None if run_flags.command == "sample" else open_source(setup)
  return experiment_lib.Experiment(
    mesh=_make_mesh(run_flags),
    source=source,
    vocabulary=open_vocabulary(setup, source, configs.config.n_vocab),
    config=configs.config,
    train_cfg=configs.train_cfg,
    workdir=setup.workdir,
    cache_dir=setup.cache_dir,
    measures=spec.measures,
    token_name="token" if setup.vocab_file else spec.token_name,
    image_size=setup.preset.image_size,
    seed=run_flags.seed,
    eval_rows=run_flags.evaluation.eval_rows,
    eval_window=run_flags.evaluation.eval_window,
  )


def _make_mesh(run_flags: RunFlags) -> jax.sharding.Mesh | None:
  """Returns the mesh of the training; the other commands use one device."""
  devices = run_flags.devices
  if run_flags.command != "train" or not (devices.mesh or devices.multihost):
    return None
  return sharding.make_mesh(devices.mesh or f"data:{jax.device_count()}")
