"""Turns the flags of a command into configurations, paths, data, a vocabulary and an experiment."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import NamedTuple

from absl import flags
import jax

from experiments import config_flags, initialization, specs
from experiments.run_flags import RunFlags
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.data.sources import base
from tvq_haiku.data.vocabulary import Vocabulary
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.utils import progress

_RUN_COMMANDS = ("validation", "test", "sample", "export")  # commands that need a run


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
  size = specs.SMOKE if run_flags.smoke else run_flags.size or spec.default_size
  workdir = pathlib.Path(run_flags.workdir or _default_workdir(spec, run_flags, size))
  vocab_file = _vocabulary_file(spec, run_flags, workdir)
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


def _default_workdir(spec: specs.ExperimentSpec, run_flags: RunFlags, size: str) -> str:
  """Returns the working directory of a command without --workdir.

  Args:
    spec: the experiment.
    run_flags: the flags of the command.
    size: name of the preset.

  Raises:
    ValidationError: the directory contains the name of the data, and --data_dir is missing.
  """
  parts = [spec.name]
  if spec.names_data and not run_flags.smoke:
    if run_flags.data_dir is not None:
      parts.append(base.data_name(run_flags.data_dir))
    elif run_flags.command in _RUN_COMMANDS:
      runs = sorted(map(str, pathlib.Path("runs").glob(f"{spec.name}*")))
      raise flags.ValidationError(
        f"--command={run_flags.command} needs a run: set --workdir, or set --data_dir to the data "
        "that the run was trained on." + (f" Existing runs: {', '.join(runs)}." if runs else "")
      )
  return "runs/" + "-".join(parts if size == specs.SIZES[0] else [*parts, size])


def _vocabulary_file(
  spec: specs.ExperimentSpec, run_flags: RunFlags, workdir: pathlib.Path
) -> pathlib.Path | None:
  """Returns the path of the SentencePiece model, or None if the tokens are bytes.

  Args:
    spec: the experiment.
    run_flags: the flags of the command.
    workdir: directory of the run.
  """
  if run_flags.vocab is not None:
    return None if run_flags.vocab == specs.BYTES else pathlib.Path(run_flags.vocab)
  file = workdir / run_directory.VOCABULARY_FILE
  if file.exists():
    return file
  if run_directory.has_checkpoint(workdir):
    return None
  if run_flags.train.init is not None:
    return initialization.find_vocabulary(run_flags.train.init)
  return None if spec.vocabularies[0] == specs.BYTES else file


def resolve_configs(setup: RunSetup) -> Configs:
  """Returns the configurations of `_base_configs`, changed by the --config flags.

  If --config.n_max_step shortens the training, the warm-up takes at most a tenth of it, unless
  --config.n_warmup_step is given.

  Raises:
    IllegalFlagValueError: the configurations would be invalid.
    ValueError: --init names no model.
  """
  base_configs, train_changes = _base_configs(setup), dict(setup.flags.train_changes)
  if "n_max_step" in train_changes:
    tenth = train_changes["n_max_step"] // 10
    n_warmup_step = min(base_configs.train_cfg.n_warmup_step, tenth)
    train_changes.setdefault("n_warmup_step", n_warmup_step)
  return Configs(
    config_flags.apply_changes(base_configs.config, setup.flags.model_changes),
    config_flags.apply_changes(base_configs.train_cfg, train_changes),
  )


def _base_configs(setup: RunSetup) -> Configs:
  """Returns the configurations that the --config flags change.

  These are the configurations of the preset, but with the model of --init. --command=info describes
  the run in --workdir if there is one.
  """
  configs, init = Configs(setup.preset.config, setup.preset.train_cfg), setup.flags.train.init
  is_run = run_directory.has_checkpoint(setup.workdir)
  if is_run and setup.flags.command == "info":
    return Configs(*run_directory.load_config(setup.workdir))
  if init is None:
    return configs
  if is_run:  # it was started from --init, which may no longer exist
    return configs._replace(config=run_directory.load_config(setup.workdir)[0])
  return configs._replace(config=initialization.read_config(init))


def open_source(setup: RunSetup) -> base.Source:
  """Returns the data set in --data_dir, or with --smoke a small one, written to WORKDIR/data."""
  if setup.flags.smoke:
    return setup.spec.smoke_source(_data_dir(setup))
  return setup.spec.source(setup.flags.data_dir)


def _data_dir(setup: RunSetup) -> pathlib.Path | None:
  """Returns the file or directory of the data set; None if it is not known."""
  if setup.flags.smoke:
    return setup.workdir / "data"
  return pathlib.Path(setup.flags.data_dir) if setup.flags.data_dir else None


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
  source = open_source(setup)
  return experiment_lib.Experiment(
    mesh=_make_mesh(run_flags),
    source=source,
    vocabulary=open_vocabulary(setup, source, configs.config.n_vocab),
    config=configs.config,
    train_cfg=configs.train_cfg,
    workdir=setup.workdir,
    cache_dir=setup.cache_dir,
    data_dir=_data_dir(setup),
    measures=spec.measures,
    # A token is a byte only if no tokens end documents: see `run.measures`.
    token_name="token" if setup.vocab_file or source.has_eos else spec.token_name,
    name=spec.name,
    image_size=setup.preset.image_size,
    top_p=spec.top_p,
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
