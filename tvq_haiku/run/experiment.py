"""An experiment: a model, the data it learns from, and a directory for all that comes of it.

WORKDIR/                  a run, as in `checkpoints`, with its best/ checkpoint
        vocab.model       if tokens are pieces of words
        data.json         what it was trained on
        metrics.jsonl     and tensorboard/: see `records`
        validation, test  .figures.json: what was measured on these splits
        samples/          what it wrote, or drew
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import io
import json
import pathlib
from typing import Any

import jax
import numpy as np

from tvq_haiku.checkpoint import checkpoints, run_directory
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data import image_grid, packing, token_cache
from tvq_haiku.data.sentencepiece_vocabulary import PieceVocabulary
from tvq_haiku.data.sources.base import Source
from tvq_haiku.data.vocabulary import ByteVocabulary, Vocabulary
from tvq_haiku.evaluation import flops, likelihood
from tvq_haiku.generation import generate as generate_lib
from tvq_haiku.model import transformer
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import metric_writers, trainer
from tvq_haiku.training import train_step as train_step_lib
from tvq_haiku.utils import files

VOCABULARY_FILE = "vocab.model"
_DATA = "data.json"
_IDENTITY = ("vocabulary", "n_byte", "n_token", "checksum")  # of data
_SAMPLES = "samples"
# What papers report, from the whole split's likelihood and what was counted in its raw files.
MEASURES = {
  "bits_per_byte": lambda likelihood, facts: likelihood.bits_per(facts.n_byte),
  "bits_per_dim": lambda likelihood, facts: likelihood.bits_per(facts.n_byte),
  "word_perplexity": lambda likelihood, facts: likelihood.perplexity_per(facts.n_word),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """What is trained on what, and where."""

  source: Source | None  # None: for samples alone
  vocabulary: Vocabulary
  config: TransformerConfig
  train_cfg: TrainConfig
  workdir: pathlib.Path
  cache_dir: pathlib.Path  # of encoded splits, which runs share
  measures: Sequence[str]  # of MEASURES
  token_name: str  # such as "byte", for people
  image_size: int | None = None  # height and width, if every document is an image
  seed: int = 0
  eval_rows: int = 8
  eval_window: int = 512
  mesh: jax.sharding.Mesh | None = None  # devices that share training and its validation

  def __post_init__(self):
    train_step_lib.check_sizes(self.config, self.train_cfg, self.mesh)
    self.vocabulary.check("config.n_vocab", self.config.n_vocab)
    if not self.config.causal:
      raise ValueError("causal=False: an encoder sees the tokens that it would predict.")
    if self.train_cfg.sequence_len % self.align:
      raise ValueError(
        f"sequence_len={self.train_cfg.sequence_len} must be a multiple of the "
        f"{self.align} tokens of an image."
      )

  @property
  def align(self) -> int:
    """Sequences begin at multiples of it: no image is cut."""
    return 3 * self.image_size**2 if self.image_size else 1

  def open_split(self, split: str) -> token_cache.Split:
    """The tokens of a split."""
    return token_cache.open_split(self.source, split, self.vocabulary, self.cache_dir)

  def likelihood(
    self,
    config: TransformerConfig,
    params: Any,
    split: token_cache.Split,
    *,
    max_tokens: int | None = None,
    stop: object = False,
    mesh: jax.sharding.Mesh | None = None,
  ) -> dict[str, float] | None:
    """What a split costs: `loss_lm` in nats per token, and the measures.

    Args:
      config: of the model.
      params: of the model.
      split: what to read.
      max_tokens: read the first so many, in whole images; of less than the whole split, there is
        `loss_lm` alone, since its words were not counted.
      stop: when it becomes true, the result is None.
      mesh: where the parameters are; None: one device.
    """
    n = split.statistics.n_token
    if max_tokens is not None and max_tokens < n:
      n = max(max_tokens // self.align, 1) * self.align
    found = likelihood.evaluate(
      config,
      params,
      split.stream.head(n),
      batch_size=self.eval_rows,
      window_len=self.eval_window,
      align=self.align,
      show_progress=multihost.is_main_process(),
      stop=stop,
      mesh=mesh,
    )
    if found is None:
      return None
    if found.tokens != n:
      raise RuntimeError(f"{found.tokens} tokens were read of {n}.")
    measures = self.measures if n == split.statistics.n_token else ()
    return {"loss_lm": found.nats_per_token} | {
      name: MEASURES[name](found, split.statistics) for name in measures
    }


def train(
  experiment: Experiment,
  *,
  params: Any = None,
  validate_tokens: int | None = None,
  tensorboard: bool = True,
  wandb: str | None = None,
  **settings: Any,
) -> checkpoints.Checkpoint:
  """Trains, or goes on, with records, validation, and the last and the best checkpoint kept.

  Args:
    experiment: what, and where.
    params: to begin with, instead of fresh ones.
    validate_tokens: how much of the split validations read, at most; None: all of it.
    tensorboard: write event files.
    wandb: a project of Weights & Biases to report to.
    **settings: of `loop.fit`, such as `save_seconds`.

  Returns:
    The last checkpoint; its step is short of `n_max_step` if the run was asked to end.

  Raises:
    CheckpointError: the directory holds a run of another configuration, or on other data.
    ValueError, OSError: something is wrong with the data or a directory.
  """
  workdir = files.prepare_directory(experiment.workdir)
  try:
    lock = (
      files.lock(workdir / ".lock", wait=False)
      if multihost.is_main_process()
      else contextlib.nullcontext()
    )
    with lock:
      return _train(
        experiment,
        workdir,
        params=params,
        validate_tokens=validate_tokens,
        tensorboard=tensorboard,
        wandb=wandb,
        **settings,
      )
  except BlockingIOError as error:
    raise checkpoints.CheckpointError(
      f"{workdir}: another process trains there. Wait for it, or use another directory."
    ) from error


def _train(
  e: Experiment,
  workdir: pathlib.Path,
  *,
  params: Any,
  validate_tokens: int | None,
  tensorboard: bool,
  wandb: str | None,
  **settings: Any,
) -> checkpoints.Checkpoint:
  if run_directory.has_checkpoint(workdir):
    run_directory.check_same_run(workdir, e.config, e.train_cfg)
  splits = {name: e.open_split(name) for name in ("train", "validation")}
  host, n_host = sharding.process_share(e.mesh, e.train_cfg.global_batch_size)
  batches = packing.PackedBatches(
    splits["train"].stream,
    batch_size=e.train_cfg.global_batch_size,
    host=host,
    n_host=n_host,
    sequence_len=e.train_cfg.sequence_len,
    seed=e.seed,
    aligned=e.image_size is not None,
  )
  facts = {name: dataclasses.asdict(split.statistics) for name, split in splits.items()}
  before = _trained_on(workdir) if run_directory.has_checkpoint(workdir) else {}
  if differences := [
    f"{split} {name}={before[split][name]!r} there, {facts[split][name]!r} now"
    for split in before
    for name in _IDENTITY
    if before[split][name] != facts[split][name]
  ]:
    raise checkpoints.CheckpointError(
      f"{workdir} holds a run on other data: {'; '.join(differences)}. Use another directory."
    )
  begin = trainer.resume_or_initialize(
    e.config, e.train_cfg, workdir, seed=e.seed, mesh=e.mesh, params=params
  )
  with contextlib.ExitStack() as stack:
    record = None
    if multihost.is_main_process():
      if isinstance(e.vocabulary, PieceVocabulary):  # so that the run can be used without it
        files.write_atomically(workdir / VOCABULARY_FILE, e.vocabulary.file.read_bytes())
      files.write_atomically(workdir / _DATA, json.dumps(facts, indent=1))
      record = stack.enter_context(
        metric_writers.open_writers(
          workdir,
          step=int(begin.train_state.step),
          tensorboard=tensorboard,
          wandb=wandb,
          settings=dataclasses.asdict(e.config) | dataclasses.asdict(e.train_cfg),
        )
      )
    return trainer.fit(
      e.config,
      e.train_cfg,
      batches,
      workdir,
      seed=e.seed,
      mesh=e.mesh,
      begin=begin,
      token_name=e.token_name,
      record=record,
      peak_flops=flops.measured_peak(e.config.compute_dtype) * _n_machine(e.mesh),
      validate=lambda params, stop: e.likelihood(
        e.config, params, splits["validation"], max_tokens=validate_tokens, stop=stop, mesh=e.mesh
      ),
      **settings,
    )


def _n_machine(mesh: jax.sharding.Mesh | None) -> int:
  """How many times the peak of one device there is; the CPU devices of a host are one machine."""
  if mesh is None:
    return 1
  return jax.process_count() if jax.default_backend() == "cpu" else mesh.size


def _trained_on(workdir: pathlib.Path) -> dict[str, Any]:
  """The facts of the splits that a run was trained on, as far as they were noted."""
  file = workdir / _DATA
  try:
    facts = json.loads(file.read_text()) if file.exists() else {}
    return {split: {name: facts[split][name] for name in _IDENTITY} for split in facts}
  except (LookupError, TypeError, ValueError) as error:
    raise checkpoints.CheckpointError(
      f"{file} is damaged. Remove it to go on without knowing what the run was trained on."
    ) from error


def load_run(
  workdir: pathlib.Path, *, weights: str = "best", changes: Mapping[str, Any] | None = None
) -> checkpoints.Checkpoint:
  """A checkpoint of an experiment's run.

  Args:
    workdir: of the run.
    weights: "best": what validation liked best, if there is one; "last": the newest.
    changes: of the model's configuration, such as its precision.

  Raises:
    CheckpointError: there is none.
    ValueError: the changes need other parameters.
  """
  best = workdir / run_directory.BEST_DIRECTORY
  if weights == "best" and run_directory.has_checkpoint(best):
    try:
      run = checkpoints.load_checkpoint(best)
    except checkpoints.CheckpointError as error:
      raise checkpoints.CheckpointError(
        f"{error} --weights=last takes the newest instead."
      ) from error
  else:
    run = checkpoints.load_checkpoint(workdir)
  config = run.config.replace(**(changes or {}))
  transformer.check_params(run.train_state.params, config)
  return run._replace(config=config)


def check_vocabulary(experiment: Experiment) -> None:
  """Raises a CheckpointError unless the run was trained with the experiment's vocabulary."""
  for facts in _trained_on(experiment.workdir).values():
    if facts["vocabulary"] != experiment.vocabulary.fingerprint:
      raise checkpoints.CheckpointError(
        f"{experiment.workdir} holds a run with the vocabulary {facts['vocabulary']}, not "
        f"{experiment.vocabulary.fingerprint}. Leave --vocab out to use the run's own."
      )


def evaluate(
  experiment: Experiment, run: checkpoints.Checkpoint, split_name: str
) -> dict[str, Any]:
  """Measures a checkpoint on a whole split, and writes what it found to `<split>.figures.json`."""
  check_vocabulary(experiment)
  split = experiment.open_split(split_name)
  token_cache.verify(split)
  found = experiment.likelihood(run.config, run.train_state.params, split)
  figures = found | {
    "step": int(run.train_state.step),
    "tokens": split.statistics.n_token,
    "bytes": split.statistics.n_byte,
    "rows": experiment.eval_rows,
  }
  file = experiment.workdir / f"{split_name}.figures.json"
  files.write_atomically(file, json.dumps(metric_writers.finite(figures), indent=1) + "\n")
  return figures


def sample_texts(
  experiment: Experiment,
  run: checkpoints.Checkpoint,
  prompts: Sequence[bytes],
  *,
  length: int,
  **settings: Any,
) -> tuple[list[str], pathlib.Path]:
  """Texts that go on from each prompt, and the file under samples/ where they are."""
  check_vocabulary(experiment)
  texts = generate_lib.continue_text(
    run.train_state.params,
    run.config,
    prompts,
    max_new_tokens=length,
    rng=jax.random.key(experiment.seed),
    vocabulary=experiment.vocabulary,
    show_progress=True,
    **settings,
  )
  whole = [prompt.decode(errors="replace") + text for prompt, text in zip(prompts, texts)]
  file = _sample_file(experiment, run, "txt")
  files.write_atomically(
    file, "\n\n".join(f"--- {i} ---\n{text}" for i, text in enumerate(whole)) + "\n"
  )
  return whole, file


def sample_images(
  experiment: Experiment, run: checkpoints.Checkpoint, n: int, **settings: Any
) -> pathlib.Path:
  """A grid of n images, in a file under samples/."""
  size = experiment.image_size
  start = np.full((n, 1), ByteVocabulary.EOS, np.int32)
  out = generate_lib.generate(
    run.train_state.params,
    run.config,
    start,
    max_new_tokens=3 * size**2,
    rng=jax.random.key(experiment.seed),
    show_progress=True,
    **settings,
  )
  file = _sample_file(experiment, run, "png")
  grid, content = (
    image_grid.images_from_tokens(np.asarray(out.tokens), height=size, width=size),
    io.BytesIO(),
  )
  image_grid.image_grid(grid).save(content, format="png")
  files.write_atomically(file, content.getvalue())
  return file


def _sample_file(experiment: Experiment, run: checkpoints.Checkpoint, ending: str) -> pathlib.Path:
  directory = files.prepare_directory(experiment.workdir / _SAMPLES)
  return files.unused_path(
    directory / f"step-{int(run.train_state.step)}-seed-{experiment.seed}.{ending}"
  )
