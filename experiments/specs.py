"""Describes an experiment: its data, its model sizes and the metrics that it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import pathlib
from typing import NamedTuple

import tvq_haiku as tvq
from tvq_haiku.data.sources import base

SIZES = ("paper", "cpu")  # choices of --size; --smoke selects the preset SMOKE instead
SMOKE = "smoke"
BYTES, SENTENCEPIECE = "bytes", "sentencepiece"  # kinds of vocabulary


class SizePreset(NamedTuple):
  """A model and its training, as default values of the configuration flags."""

  config: tvq.TransformerConfig
  train_cfg: tvq.TrainConfig
  image_size: int | None = None  # height and width of the images in pixels; None: text


class ExperimentSpec(NamedTuple):
  """The settings that distinguish one experiment from the others."""

  name: str  # name of the command; the default working directory contains it
  source: Callable[[str | None], base.Source]  # opens the data set in --data_dir
  smoke_source: Callable[[pathlib.Path], base.Source]  # writes a small data set to a directory
  presets: Mapping[str, SizePreset]  # keys: SIZES and SMOKE
  measures: tuple[str, ...]  # metrics to report, the main one first; see `run.measures`
  token_name: str = "byte"  # what one token is, for messages
  vocabularies: tuple[str, ...] = (BYTES,)  # kinds that --vocab may select, the default first
  top_p: float = 0.95  # default of --top_p
  default_size: str = SIZES[0]  # default of --size
  names_data: bool = False  # whether the default working directory is runs/NAME-DATA, not runs/NAME


# A byte-level text model that two CPU cores train in minutes.
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

# A byte-level text model that trains in seconds, to check that everything works; it learns little.
TEXT_SMOKE = SizePreset(
  tvq.TransformerConfig.tiny(n_layer=1, remat="none"),
  tvq.TrainConfig(
    lr_max=4e-3, n_warmup_step=5, n_max_step=20, sequence_len=64, update_len=64, global_batch_size=4
  ),
)
