"""What the paper's experiments share: flags, and which part of the library each command calls.

Every setting of the model and of its training is a flag: --config.d_model=512 --config.lr_max=1e-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
import os
import pathlib
import shlex
import sys
from typing import NamedTuple

from absl import flags
import jax

from experiments import config_flags, launcher
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.checkpoint import export, run_directory
from tvq_haiku.data import token_cache, vocabulary
from tvq_haiku.data.sources import base
from tvq_haiku.evaluation import memory_plan
from tvq_haiku.model import remat as remat_lib
from tvq_haiku.model import transformer
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import best_checkpoint, summary
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.utils import progress

flags.adopt_module_key_flags(config_flags)  # so that --help lists them

_COMMAND = flags.DEFINE_enum(
  "command",
  "train",
  ("train", "validation", "test", "sample", "train_vocab", "export", "info"),
  "What to do.",
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the data are.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; default runs/NAME, runs/NAME-cpu or runs/NAME-smoke."
)
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir",
  None,
  f"Where encoded data are kept; default {token_cache.default_directory()}, or "
  "WORKDIR/cache with --smoke.",
)
_SIZE = flags.DEFINE_enum(
  "size",
  "paper",
  ("paper", "cpu"),
  "Settings to begin with: the paper's, or a model that two CPU cores train in minutes.",
)
_SMOKE = flags.DEFINE_boolean(
  "smoke", False, "A tiny model on little embedded data: the path, not the result."
)
_SEED = flags.DEFINE_integer(
  "seed",
  0,
  "Seeds parameters, the order of the data and samples.",
  lower_bound=0,
  upper_bound=2**32 - 1,
)
_VOCAB = flags.DEFINE_string(
  "vocab",
  None,
  "A SentencePiece .model, or 'bytes'; default: what suits the data. Books: "
  "WORKDIR/vocab.model, which is trained if it is missing.",
)
_VOCAB_BYTES = flags.DEFINE_integer(
  "vocab_bytes",
  200_000_000,
  "How much of the training split a vocabulary is trained on, at most.",
  lower_bound=1,
)
_LOG_EVERY = flags.DEFINE_integer("log_every", 10, "Updates between two records.", lower_bound=1)
_VALIDATE_EVERY = flags.DEFINE_integer(
  "validate_every", 1000, "Updates between two validations.", lower_bound=1
)
_VALIDATE_TOKENS = flags.DEFINE_integer(
  "validate_tokens",
  10_000_000,
  "How many tokens of the split a validation in training reads, at most.",
  lower_bound=1,
)
_SAVE_SECONDS = flags.DEFINE_float(
  "save_seconds", 60.0, "Between two checkpoints.", lower_bound=0.0
)
_TENSORBOARD = flags.DEFINE_boolean("tensorboard", True, "Write event files for TensorBoard.")
_WANDB = flags.DEFINE_string("wandb", None, "A project of Weights & Biases to report to.")
_KEEP = flags.DEFINE_integer("keep", 2, "So many of the last checkpoints are kept.", lower_bound=1)
_MESH = flags.DEFINE_string(
  "mesh",
  None,
  "Devices that share the training, as data:8 (rows of the batch), fsdp:8 (parameters, too), "
  "model:2 (heads or the width of values), sequence:4 (pieces of a sequence), or several: data:4,model:2. "
  "Default: one device, or data:ALL with --multihost.",
)
_MULTIHOST = flags.DEFINE_boolean(
  "multihost",
  False,
  "This is one of several processes of a run, all started with the same flags but "
  "--process. Without the next three flags, the cluster says which.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process.")
_N_PROCESS = flags.DEFINE_integer("n_process", None, "How many processes there are.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.", lower_bound=0)
_MAX_SKIPPED = flags.DEFINE_integer(
  "max_skipped",
  20,
  "An update whose loss or gradients are not finite is skipped; so many in a row end the run.",
  lower_bound=1,
)
_DEBUG_NANS = flags.DEFINE_boolean(
  "debug_nans",
  False,
  "End at the first such update, compute it again without compiling, and name the "
  "first tensor that is not finite.",
)
_INIT = flags.DEFINE_string("init", None, "Begin with the parameters of this .safetensors file.")
_EVAL_ROWS = flags.DEFINE_integer(
  "eval_rows",
  8,
  "Pieces of a split that are read side by side: more are faster, but each begins without context.",
  lower_bound=1,
)
_EVAL_WINDOW = flags.DEFINE_integer(
  "eval_window",
  512,
  "Tokens of each that are read at a time; changes nothing but speed.",
  lower_bound=1,
)
_WEIGHTS = flags.DEFINE_enum(
  "weights", "best", ("best", "last"), "Which checkpoint to measure or to sample from."
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [""], "Text to go on from; may be given several times."
)
_LENGTH = flags.DEFINE_integer("length", 500, "Tokens to write, at most.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 4, "Images to draw.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 1.0, "0 takes the likeliest token.", lower_bound=0.0
)
_TOP_P = flags.DEFINE_float(
  "top_p", 0.95, "Nucleus of the likeliest tokens.", lower_bound=1e-9, upper_bound=1.0
)


_PARAMETERS = "params.safetensors"
_OF_TRAINING_ALONE = ("command", "init", "mesh", "multihost", "coordinator", "n_process", "process")


class SizePreset(NamedTuple):
  """A model, how it is trained, and the height and width of its images, if it is one of images."""

  config: tvq.TransformerConfig
  train_cfg: tvq.TrainConfig
  image_size: int | None = None


class ExperimentSpec(NamedTuple):
  """In what an experiment differs from the others."""

  name: str
  source: Callable[[str | None], base.Source]  # what the data directory holds
  smoke_source: Callable[[pathlib.Path], base.Source]  # writes small data to a directory
  sizes: Mapping[str, SizePreset]  # "paper", "cpu" and "smoke"
  measures: tuple[str, ...]  # the first is the one to look at
  token_name: str = "byte"
  vocabularies: tuple[str, ...] = (
    "bytes",
  )  # and "pieces"; the first is used unless --vocab is given


# Of bytes of text.
TEXT_CPU = SizePreset(
  tvq.TransformerConfig(
    n_vocab=259,
    d_model=256,
    d_k=32,
    d_v=512,
    n_code=128,
    n_layer=1,
    block_len=128,
    mem_len=128,
    remat="none",
  ),
  tvq.TrainConfig(
    lr_max=4e-3,
    n_warmup_step=100,
    n_max_step=4000,
    sequence_len=2048,
    update_len=512,
    global_batch_size=2,
  ),
)
TEXT_SMOKE = SizePreset(
  tvq.TransformerConfig.tiny(n_layer=1, remat="none"),
  tvq.TrainConfig(
    lr_max=4e-3, n_warmup_step=5, n_max_step=20, sequence_len=64, update_len=64, global_batch_size=4
  ),
)


def _sized(sizes: SizePreset) -> tuple[tvq.TransformerConfig, tvq.TrainConfig]:
  """The configurations with what flags set; a shorter training gets a shorter warm-up."""
  training = config_flags.explicit_flags(tvq.TrainConfig)
  if "n_max_step" in training:
    training.setdefault(
      "n_warmup_step", min(sizes.train_cfg.n_warmup_step, training["n_max_step"] // 10)
    )
  return (
    config_flags.apply_flags(sizes.config, config_flags.explicit_flags(tvq.TransformerConfig)),
    config_flags.apply_flags(sizes.train_cfg, training),
  )


def launch(paper: ExperimentSpec) -> None:
  """Runs the experiment's command."""
  launcher.launch(paper.name, lambda: _main(paper))


def _main(paper: ExperimentSpec) -> None:
  command = _COMMAND.value
  if (command != "train" and _MULTIHOST.value) or (
    command not in ("train", "info") and _MESH.value
  ):
    raise flags.ValidationError(f"--command={command}: --mesh and --multihost are for training.")
  if _MULTIHOST.value:
    multihost.initialize(_COORDINATOR.value, _N_PROCESS.value, _PROCESS.value)
  elif any(flag.value is not None for flag in (_COORDINATOR, _N_PROCESS, _PROCESS)):
    raise flags.ValidationError("--coordinator, --n_process and --process need --multihost.")
  place = _Place(paper)
  if command in ("validation", "test", "sample", "export"):
    run = experiment_lib.load_run(
      place.workdir,
      weights=_WEIGHTS.value,
      changes=config_flags.explicit_flags(tvq.TransformerConfig),
    )
    config, train_cfg = run.config, run.train_cfg
  else:
    config, train_cfg = _sized(place.sizes)
  match command:
    case "train":
      _train(place.experiment(config, train_cfg))
    case "validation" | "test":
      _measure(place.experiment(config, train_cfg), run, command)
    case "sample":
      _sample(place.experiment(config, train_cfg), run)
    case "export":
      file = place.workdir / _PARAMETERS
      export.export_params(file, config, run.train_state.params)
      print(f"Written to {file}, after {int(run.train_state.step)} updates")
    case "train_vocab":
      place.train_vocab(config.n_vocab)
    case "info":
      print(summary.describe_model(config, train_cfg))
      if _MESH.value:
        print("\n" + memory_plan.describe_plan(config, train_cfg, sharding.parse_mesh(_MESH.value)))
      _describe_data(place, config, train_cfg)


class _Place:
  """Where an experiment finds its sizes, its data and its vocabulary."""

  def __init__(self, paper: ExperimentSpec):
    if _SMOKE.value and _DATA_DIR.value is not None:
      raise flags.ValidationError("--smoke brings its own data: leave --data_dir out.")
    if _VOCAB.value and "pieces" not in paper.vocabularies:
      raise flags.ValidationError(f"--vocab={_VOCAB.value}: the tokens of {paper.name} are bytes.")
    size = "smoke" if _SMOKE.value else _SIZE.value
    self.paper, self.sizes = paper, paper.sizes[size]
    ending = "" if size == "paper" else f"-{size}"
    self.workdir = pathlib.Path(_WORKDIR.value or f"runs/{paper.name}{ending}")
    there = self.workdir / experiment_lib.VOCABULARY_FILE
    uses_bytes = _VOCAB.value == "bytes" or (
      _VOCAB.value is None and paper.vocabularies[0] == "bytes" and not there.exists()
    )
    self.vocab_file = None if uses_bytes else pathlib.Path(_VOCAB.value or there)
    # A smoke run leaves nothing outside of its directory.
    cache_dir = self.workdir / "cache" if _SMOKE.value else token_cache.default_directory()
    self.cache_dir = pathlib.Path(_CACHE_DIR.value or cache_dir)

  @functools.cached_property
  def source(self) -> base.Source:
    if _SMOKE.value:
      return self.paper.smoke_source(self.workdir / "data")
    return self.paper.source(_DATA_DIR.value)

  def train_vocab(self, size: int) -> None:
    if self.vocab_file is None:
      raise flags.ValidationError(
        "--command=train_vocab: the tokens are bytes, there is no vocabulary to train."
      )
    if self.vocab_file.exists():
      raise ValueError(f"{self.vocab_file} exists already: remove it, or name another --vocab.")
    lines = self.source.sample(_VOCAB_BYTES.value, seed=_SEED.value)
    progress.log(f"training a vocabulary of {size:,} pieces: {self.vocab_file}")
    data.train_pieces(lines, self.vocab_file, size=size)

  def vocabulary(self, config: tvq.TransformerConfig) -> vocabulary.Vocabulary:
    if self.vocab_file is None:
      return data.ByteVocabulary
    if not multihost.is_main_process():
      multihost.barrier("vocabulary")
    if not self.vocab_file.exists():
      if _VOCAB.value is not None or _COMMAND.value != "train":
        raise ValueError(
          f"there is no vocabulary {self.vocab_file}: --command=train_vocab trains one."
        )
      self.train_vocab(config.n_vocab)
    if multihost.is_main_process():
      multihost.barrier("vocabulary")
    return data.PieceVocabulary(self.vocab_file)

  def experiment(
    self, config: tvq.TransformerConfig, train_cfg: tvq.TrainConfig
  ) -> experiment_lib.Experiment:
    mesh = _MESH.value or (f"data:{jax.device_count()}" if _MULTIHOST.value else None)
    return experiment_lib.Experiment(
      mesh=sharding.make_mesh(mesh) if mesh else None,
      source=None if _COMMAND.value == "sample" else self.source,
      vocabulary=self.vocabulary(config),
      config=config,
      train_cfg=train_cfg,
      workdir=self.workdir,
      cache_dir=self.cache_dir,
      measures=self.paper.measures,
      token_name="token" if self.vocab_file else self.paper.token_name,
      image_size=self.sizes.image_size,
      seed=_SEED.value,
      eval_rows=_EVAL_ROWS.value,
      eval_window=_EVAL_WINDOW.value,
    )


def _train(experiment: experiment_lib.Experiment) -> None:
  config, train_cfg = experiment.config, experiment.train_cfg
  sizes = dict(experiment.mesh.shape) if experiment.mesh else None
  need = sum(memory_plan.plan_memory(config, train_cfg, sizes).memory.values())
  if need > (have := remat_lib.device_memory_bytes(jax.devices()[0])):
    progress.log(
      f"this needs about {need / 1e9:,.0f} GB of memory, and there are {have / 1e9:,.0f}: "
      "--size=cpu begins with a small model."
    )
  params = None
  if _INIT.value is not None and run_directory.latest_step(experiment.workdir) is not None:
    progress.log(
      f"{experiment.workdir} holds a run already: it goes on with its own parameters, not with "
      f"those of --init={_INIT.value}"
    )
  elif _INIT.value is not None:
    try:
      params = export.import_params(_INIT.value)[1]
      transformer.check_params(params, config)
    except (OSError, ValueError) as error:
      raise ValueError(f"--init={_INIT.value}: {error}") from error
  run = experiment_lib.train(
    experiment,
    params=params,
    log_every=_LOG_EVERY.value,
    validate_every=_VALIDATE_EVERY.value,
    validate_tokens=_VALIDATE_TOKENS.value,
    save_seconds=_SAVE_SECONDS.value,
    max_to_keep=_KEEP.value,
    tensorboard=_TENSORBOARD.value,
    wandb=_WANDB.value,
    max_skipped=_MAX_SKIPPED.value,
    debug_nans=_DEBUG_NANS.value,
  )
  if not multihost.is_main_process():
    return
  made, total = int(run.train_state.step), run.train_cfg.n_max_step
  if made < total:
    print(f"Stopped after {made} of {total} updates and saved. To go on: {_this_command()}")
    return
  found = best_checkpoint.read_validations(experiment.workdir)
  if found.step < made:
    print(
      f"Trained: {made} updates; the last validation was broken off. To make up for it: "
      f"{_this_command()}"
    )
    return
  best = (
    "No validation gave a number."
    if found.best_step < 0
    else (
      f"Best on validation: {found.best_loss / math.log(2):.4f} bits per {experiment.token_name}, after "
      f"{found.best_step}."
    )
  )
  print(
    f"Trained: {made} updates. {best}\nTo test it: {_this_command('test')}\n"
    f"To sample:  {_this_command('sample')}"
  )


def _measure(experiment: experiment_lib.Experiment, run: tvq.Checkpoint, split: str) -> None:
  found = experiment_lib.evaluate(experiment, run, split)
  figures = ", ".join(
    f"{name} {found[name]:{'.4f' if found[name] < 1e5 else '.3g'}}" for name in experiment.measures
  )
  print(
    f"{split}: {figures}, loss_lm {found['loss_lm']:.4f} nats per token, over "
    f"{found['tokens']:,} tokens of {found['bytes']:,} bytes, after {found['step']} updates"
  )


def _sample(experiment: experiment_lib.Experiment, run: tvq.Checkpoint) -> None:
  drawing = dict(temperature=_TEMPERATURE.value, top_p=_TOP_P.value)
  if experiment.image_size:
    file = experiment_lib.sample_images(experiment, run, _IMAGES.value, **drawing)
  else:
    prompts = [os.fsencode(prompt) for prompt in _PROMPT.value]
    texts, file = experiment_lib.sample_texts(
      experiment, run, prompts, length=_LENGTH.value, **drawing
    )
    print("\n\n".join(texts))
  print(f"Written to {file}")


def _describe_data(
  place: _Place, config: tvq.TransformerConfig, train_cfg: tvq.TrainConfig
) -> None:
  if _DATA_DIR.value is None and not _SMOKE.value:
    print("\nData: to see their statistics, name the --data_dir.")
    return
  print("\nData:")
  if place.vocab_file and not place.vocab_file.exists():
    for split in base.SPLITS:
      print(f"  {split:<11}{place.source.n_byte(split):>15,} bytes")
    print(
      f"  Tokens can be counted when there is a vocabulary {place.vocab_file}: --command=train_vocab."
    )
    return
  experiment = place.experiment(config, train_cfg)
  for split in base.SPLITS:
    print(
      summary.describe_data(
        split, experiment.open_split(split).statistics, has_words=experiment.image_size is None
      )
    )


def _this_command(command: str | None = None) -> str:
  """How to start this program again; or one process of it, with another --command."""
  arguments, given = [], list(sys.argv[1:])
  while given:
    words = [given.pop(0)]
    name, _, value = words[0].lstrip("-").partition("=")
    if not value and name in flags.FLAGS and not flags.FLAGS[name].boolean and given:
      words.append(given.pop(0))  # --flag value
    if command is None or name not in _OF_TRAINING_ALONE:
      arguments += words
  arguments += [] if command is None else [f"--command={command}"]
  line = shlex.join(["python", "-m", sys.modules["__main__"].__spec__.name, *arguments])
  devices = os.environ.get("JAX_NUM_CPU_DEVICES")
  line = f"JAX_NUM_CPU_DEVICES={devices} {line}" if devices and command is None else line
  return f"{line} (and the other processes)" if _MULTIHOST.value and command is None else line
