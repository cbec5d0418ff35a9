"""Defines the flags that several commands share, and reads them into frozen dataclasses.

A command calls the functions that define the groups of flags that it uses; --help then lists these
flags among those of the command.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import TypeVar

from absl import flags

flags.disclaim_key_flags()  # the flags belong to the module that calls the functions

_TOP_P = "0.9 for enwik8, 0.8 for pg19, 0.999 for imagenet64, 0.95 for other runs"


def define_run_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines --workdir, which is required, and its earlier name --checkpoint."""
  flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the training run, of any experiment. (--checkpoint is an earlier name of this "
    "flag.)",
    required=True,
    flag_values=flag_values,
  )
  flags.DEFINE_alias("checkpoint", "workdir", flag_values=flag_values)


def define_weights_flag(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines --weights."""
  flags.DEFINE_enum(
    "weights",
    "best",
    ("best", "last"),
    "Checkpoint to load from a run. best: the one with the lowest validation loss, or the most "
    "recent one if no validation was made. last: the most recent one.",
    flag_values=flag_values,
  )


def define_evaluation_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of `EvalFlags`, except --weights."""
  flags.DEFINE_integer(
    "eval_rows",
    8,
    "Batch size of evaluations: the text is divided into this many parts, which are read in "
    "parallel. A larger number is faster, but each part starts without context.",
    lower_bound=1,
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "eval_window",
    512,
    "Number of tokens that an evaluation reads at a time. Changes the speed, not the result.",
    lower_bound=1,
    flag_values=flag_values,
  )


def define_sampling_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of `SampleFlags`."""
  _define_text_flags(flag_values)
  _define_distribution_flags(flag_values)
  _define_image_flags(flag_values)


def _define_text_flags(flag_values: flags.FlagValues) -> None:
  """Defines the flags for what is sampled, and how it is printed."""
  flags.DEFINE_multi_string(
    "prompt",
    [""],
    "Text to continue. Repeat the flag for several prompts.",
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "length",
    500,
    "Maximum number of tokens to sample for a prompt; they are bytes unless the run has a "
    "vocabulary.",
    lower_bound=1,
    flag_values=flag_values,
  )
  flags.DEFINE_multi_string(
    "stop",
    [],
    "Text that ends a sample; it is not printed. Repeat the flag for several texts.",
    flag_values=flag_values,
  )
  flags.DEFINE_boolean(
    "stream", False, "Print the text while it is sampled.", flag_values=flag_values
  )
  flags.DEFINE_boolean(
    "interactive",
    False,
    "Read prompts from standard input, line by line. Each continues the conversation so far. "
    "Ctrl-C interrupts a reply, Ctrl-D ends the conversation.",
    flag_values=flag_values,
  )


def _define_distribution_flags(flag_values: flags.FlagValues) -> None:
  """Defines the flags that change the distribution of the samples."""
  flags.DEFINE_float(
    "temperature",
    1.0,
    "Sampling temperature; 0: always the most likely token.",
    lower_bound=0.0,
    flag_values=flag_values,
  )
  flags.DEFINE_float(
    "top_p",
    None,
    "Sample from the smallest set of most likely tokens whose probabilities sum to at least this. "
    f"Default: that of the experiment of the run, {_TOP_P}.",
    lower_bound=1e-9,
    upper_bound=1.0,
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "top_k",
    None,
    "Number of most likely tokens to sample from. Default: all.",
    lower_bound=1,
    flag_values=flag_values,
  )
  flags.DEFINE_float(
    "min_p",
    None,
    "Sample from the tokens whose probability is at least this fraction of the largest one. "
    "Default: all.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=flag_values,
  )


def _define_image_flags(flag_values: flags.FlagValues) -> None:
  """Defines the flags for models of images."""
  flags.DEFINE_integer(
    "images",
    4,
    "Number of images to sample from a model of images.",
    lower_bound=1,
    flag_values=flag_values,
  )
  flags.DEFINE_string(
    "png",
    None,
    "File for the grid of sampled images. Default: a new file in WORKDIR/samples, where texts are "
    "written, too.",
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "image_size",
    None,
    "Height and width of an image in pixels. Default: that of the run; only runs of earlier "
    "versions do not record it.",
    lower_bound=1,
    flag_values=flag_values,
  )


@dataclasses.dataclass(frozen=True)
class EvalFlags:
  """Flags that choose a checkpoint, and how to read a text."""

  eval_rows: int  # batch size
  eval_window: int  # tokens
  weights: str  # "best" or "last"


@dataclasses.dataclass(frozen=True)
class SampleFlags:
  """Flags of sampling."""

  prompt: Sequence[str]
  length: int  # tokens
  stop: Sequence[str]
  temperature: float
  top_p: float | None  # None: the default of the experiment
  top_k: int | None
  min_p: float | None
  stream: bool
  interactive: bool
  images: int
  png: str | None  # path
  image_size: int | None  # pixels; None: that of the run


Group = TypeVar("Group")


def read_group(cls: type[Group], flag_values: flags.FlagValues = flags.FLAGS) -> Group:
  """Returns the values of the flags that have the names of the fields of the dataclass `cls`."""
  return cls(**{field.name: flag_values[field.name].value for field in dataclasses.fields(cls)})
