"""Defines the flags that all experiments share, and reads them into frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from absl import flags

from experiments import config_flags, shared_flags, specs
from experiments.shared_flags import EvalFlags, SampleFlags
import tvq_haiku as tvq

COMMANDS = ("train", "validation", "test", "sample", "train_vocab", "export", "info")

# -- the run and its data ------------------------------------------------------------------------
flags.DEFINE_enum(
  "command",
  "train",
  COMMANDS,
  "train: train the model, or resume its training. validation, test: evaluate it on that split. "
  "sample: generate text or images. train_vocab: train a SentencePiece vocabulary. export: write "
  "the parameters to WORKDIR/params.safetensors. info: describe the model and the data.",
)
flags.DEFINE_string("data_dir", None, "Directory or file with the data set.")
flags.DEFINE_string(
  "workdir",
  None,
  "Directory of the run. Default: runs/NAME, where NAME is the name of the experiment; for text, "
  "runs/text-DATA, where DATA is the name of the data. --size=cpu appends -cpu. With --smoke: "
  "runs/NAME-smoke.",
)
flags.DEFINE_string(
  "cache_dir",
  None,
  "Directory for encoded data, which several runs may share. Default: $XDG_CACHE_HOME/tvq_haiku, "
  "or ~/.cache/tvq_haiku if the variable is not set; WORKDIR/cache with --smoke.",
)
flags.DEFINE_enum(
  "size",
  None,
  specs.SIZES,
  "Default values of the --config flags. paper: the settings of the paper. cpu: a small model that "
  "two CPU cores train in minutes. Default: cpu for text, paper for the other experiments.",
)
flags.DEFINE_boolean(
  "smoke",
  False,
  "Use a tiny model and a small data set that needs no download, to check in seconds that "
  "everything works. The results are meaningless.",
)
flags.DEFINE_integer(
  "seed",
  0,
  "Seed of the initial parameters, dropout, the order of the data, and samples.",
  lower_bound=0,
  upper_bound=2**32 - 1,
)
flags.DEFINE_string(
  "vocab",
  None,
  "Path of a SentencePiece .model file, or 'bytes'. Default: WORKDIR/vocab.model if it exists; "
  "otherwise pg19 trains it, and the other experiments use bytes.",
)
flags.DEFINE_integer(
  "vocab_bytes", 200_000_000, "Maximum number of bytes to train a vocabulary on.", lower_bound=1
)

# -- training ------------------------------------------------------------------------------------
flags.DEFINE_integer("log_every", 10, "Number of updates between two log records.", lower_bound=1)
flags.DEFINE_integer(
  "validate_every", 1000, "Number of updates between two validations.", lower_bound=1
)
flags.DEFINE_integer(
  "validate_tokens",
  10_000_000,
  "Maximum number of tokens of the validation split that a validation during training reads.",
  lower_bound=1,
)
flags.DEFINE_float(
  "save_seconds", 60.0, "Minimum time between two checkpoints, in seconds.", lower_bound=0.0
)
flags.DEFINE_boolean("tensorboard", True, "Whether to write event files for TensorBoard.")
flags.DEFINE_string("wandb", None, "Weights & Biases project to log to. Default: none.")
flags.DEFINE_integer("keep", 2, "Number of most recent checkpoints to keep.", lower_bound=1)
flags.DEFINE_string(
  "init",
  None,
  "Directory of a run, or file written by --command=export: its parameters are the initial ones. "
  "Its model configuration replaces the defaults of --size, and its vocabulary the default one. "
  "Default: random parameters.",
)
flags.DEFINE_integer(
  "max_skipped",
  20,
  "Updates with a non-finite loss or gradient are skipped. The run ends after this many skipped "
  "updates in a row.",
  lower_bound=1,
)
flags.DEFINE_boolean(
  "debug_nans",
  False,
  "End the run at the first update with a non-finite loss or gradient, re-run that update without "
  "jit, and report the first non-finite tensor.",
)

# -- devices and processes -----------------------------------------------------------------------
flags.DEFINE_string(
  "mesh",
  None,
  "Devices to train on, as one or more AXIS:SIZE, such as data:4,model:2. Axes: data (shards the "
  "batch), fsdp (shards the batch, the parameters and the optimizer state), model (shards the "
  "heads, or the width of the values), sequence (shards each sequence). Default: one device, or "
  "data:N for all N devices with --multihost.",
)
flags.DEFINE_boolean(
  "multihost",
  False,
  "Whether this process is one of several that train together. Start all of them with the same "
  "flags, except --process. --coordinator, --n_process and --process may be left out on clusters "
  "that JAX detects.",
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with --multihost.")
flags.DEFINE_integer("n_process", None, "Number of processes, with --multihost.", lower_bound=1)
flags.DEFINE_integer(
  "process", None, "Index of this process, from 0, with --multihost.", lower_bound=0
)

# -- evaluation and samples ----------------------------------------------------------------------
shared_flags.define_weights_flag()
shared_flags.define_evaluation_flags()
shared_flags.define_sampling_flags()


@dataclasses.dataclass(frozen=True)
class TrainFlags:
  """Flags of training."""

  log_every: int  # updates
  validate_every: int  # updates
  validate_tokens: int  # tokens of the validation split
  save_seconds: float  # seconds
  tensorboard: bool
  wandb: str | None  # project
  keep: int  # checkpoints
  init: str | None  # directory of a run, or .safetensors file
  max_skipped: int  # updates
  debug_nans: bool


@dataclasses.dataclass(frozen=True)
class DeviceFlags:
  """Flags that choose the devices and processes that train together."""

  mesh: str | None  # such as "data:4,model:2"
  multihost: bool
  coordinator: str | None  # HOST:PORT
  n_process: int | None
  process: int | None  # from 0


@dataclasses.dataclass(frozen=True)
class RunFlags:
  """The flags of a command. Each field holds the value of the flag of the same name."""

  command: str  # one of COMMANDS
  data_dir: str | None
  workdir: str | None
  cache_dir: str | None
  size: str | None  # one of specs.SIZES; None: the default of the experiment
  smoke: bool
  seed: int
  vocab: str | None
  vocab_bytes: int  # bytes
  train: TrainFlags
  devices: DeviceFlags
  evaluation: EvalFlags
  sampling: SampleFlags
  model_changes: Mapping[str, Any]  # fields of TransformerConfig whose flags were given
  train_changes: Mapping[str, Any]  # fields of TrainConfig whose flags were given


def read_flags() -> RunFlags:
  """Returns the values of all flags; call it once, after they were parsed."""
  groups = dict(
    train=shared_flags.read_group(TrainFlags),
    devices=shared_flags.read_group(DeviceFlags),
    evaluation=shared_flags.read_group(EvalFlags),
    sampling=shared_flags.read_group(SampleFlags),
    model_changes=config_flags.explicit_values(tvq.TransformerConfig),
    train_changes=config_flags.explicit_values(tvq.TrainConfig),
  )
  names = {field.name for field in dataclasses.fields(RunFlags)} - groups.keys()
  return RunFlags(**{name: flags.FLAGS[name].value for name in names}, **groups)
