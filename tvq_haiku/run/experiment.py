"""An experiment: a model, the data that it is trained on, and a directory for the results.

WORKDIR/                  a training run, see `checkpoint.run_directory`
        vocab.model       the SentencePiece vocabulary, if tokens are not bytes
        experiment.json   the name of the experiment and the size of images, see `run_record`
        data.json         statistics of the training data, see `data_statistics`
        metrics.jsonl     metrics of training and validation, see `metric_writers`
        tensorboard/      the same metrics as TensorBoard event files
        SPLIT.figures.json    metrics of a complete split of the data of the run; the metrics of
                              other data are in other files, see `commands.evaluate`
        params.safetensors    exported parameters, see `commands.export_params`
        samples/          generated texts and images, see `samples`
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import pathlib

import jax

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data import token_cache
from tvq_haiku.data.sources.base import Source
from tvq_haiku.data.vocabulary import Vocabulary
from tvq_haiku.evaluation import likelihood
from tvq_haiku.model import preconditions
from tvq_haiku.parallel import multihost
from tvq_haiku.run import measures as measures_lib
from tvq_haiku.training import size_checks
from tvq_haiku.types import Params, StopRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """A model, its training, its data and its directories."""

  source: Source  # the dataset
  vocabulary: Vocabulary
  config: TransformerConfig
  train_cfg: TrainConfig
  workdir: pathlib.Path  # directory of the run
  # Directory of tokenized splits, which several runs may share; None: the default directory.
  cache_dir: pathlib.Path | None
  measures: Sequence[str]  # names in `measures.MEASURES`, the main one first
  token_name: str  # unit of the loss in the progress line, such as "byte"
  data_dir: pathlib.Path | None = (
    None  # file or directory of the dataset, named in files of metrics
  )
  name: str | None = None  # such as "pg19"; recorded in the directory of the run
  image_size: int | None = None  # height and width in pixels; None: documents are not images
  top_p: float = 0.95  # default of the sampling parameter `top_p`
  seed: int = 0  # seed of the initial parameters, dropout, the order of the data, and samples
  eval_rows: int = 8  # batch size of evaluation: number of parts of a split read in parallel
  eval_window: int = 512  # number of tokens of each part in one step of evaluation
  mesh: jax.sharding.Mesh | None = None  # devices for training and validation; None: one device

  def __post_init__(self):
    size_checks.check_sizes(self.config, self.train_cfg, self.mesh)
    self.vocabulary.check("config.n_vocab", self.config.n_vocab)
    preconditions.check_reads_tokens("Experiment", self.config)
    if self.train_cfg.sequence_len % self.align:
      raise ValueError(
        f"Experiment: sequence_len={self.train_cfg.sequence_len} must be a multiple of "
        f"{self.align}, the number of tokens per image."
      )

  @property
  def align(self) -> int:
    """The number of tokens per image, or 1 without images; sequences start at multiples of it."""
    return 3 * self.image_size**2 if self.image_size else 1

  def open_split(self, split: str) -> token_cache.Split:
    """Returns the tokens of a split; tokenizes the split first if the cache does not hold it."""
    return token_cache.open_split(self.source, split, self.vocabulary, self.cache_dir)

  def measure_split(
    self,
    params: Params,
    config: TransformerConfig,
    split: token_cache.Split,
    *,
    max_tokens: int | None = None,
    stop: StopRequest = False,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float] | None:
    """Computes the metrics of a model on a split.

    Args:
      params: parameters of the model.
      config: configuration of the model.
      split: the tokens.
      max_tokens: maximum number of tokens to read from the start of the split, rounded down to
        complete images, but at least one image (or token); None: all.
      stop: ends the computation when it becomes true.
      mesh: devices that hold the parameters; None: the default device.

    Returns:
      `loss_lm` in nats per token and, if the complete split was read, the `measures`; None if the
      computation was stopped.
    """
    n = split.statistics.n_token
    if max_tokens is not None and max_tokens < n:
      n = max(max_tokens // self.align, 1) * self.align
    total = likelihood.evaluate(
      params,
      config,
      split.stream.head(n),
      batch_size=self.eval_rows,
      window_len=self.eval_window,
      align=self.align,
      show_progress=multihost.is_main_process(),
      stop=stop,
      mesh=mesh,
    )
    if total is None:
      return None
    if total.tokens != n:
      raise RuntimeError(f"the evaluation read {total.tokens} tokens of a split of {n}.")
    # The statistics count words and bytes of the complete split only.
    measures = self.measures if n == split.statistics.n_token else ()
    return {"loss_lm": total.nats_per_token} | {
      name: measures_lib.MEASURES[name].compute(total, split.statistics) for name in measures
    }
