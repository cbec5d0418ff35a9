"""Descriptions of a model, its training and its data, as text for the command `info`."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import jax

from tvq_haiku.checkpoint import run_directory
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data.token_cache import SplitStatistics
from tvq_haiku.evaluation import flops, memory_plan
from tvq_haiku.model import parameters, transformer
from tvq_haiku.run import best_checkpoint, measures


def count_params(config: TransformerConfig) -> int:
  """Returns the number of scalar parameters of the model, including its codebooks.

  >>> count_params(TransformerConfig.enwik8())
  187679750
  """
  return sum(math.prod(x.shape) for x in jax.tree.leaves(parameters.params_shapes(config)))


def state_bytes(config: TransformerConfig) -> int:
  """Returns the bytes per batch element of the model's state, for a context of any length."""
  return memory_plan.tree_bytes(jax.eval_shape(lambda: transformer.initial_state(config, 1)))


def describe_model(config: TransformerConfig, train_cfg: TrainConfig) -> str:
  """Returns the settings of a model and of its training, and the resources that they need."""
  memory = memory_plan.plan_memory(config, train_cfg).memory
  forward = 2 * flops.forward_multiply_adds(config, train_cfg.sequence_len) / train_cfg.sequence_len
  training = flops.training_flops(config, train_cfg.sequence_len)
  tokens = train_cfg.global_batch_size * train_cfg.update_len
  return "\n".join(
    [
      "Model:",
      *_settings(config),
      "",
      "Training:",
      *_settings(train_cfg),
      "",
      f"Parameters:        {count_params(config):,}",
      f"FLOPs per token:   {forward:,.0f} forward, {training:,.0f} in training",
      f"Per update:        {tokens:,} tokens; {train_cfg.updates_per_step} updates per batch",
      f"All updates:       {tokens * train_cfg.n_update:,} tokens",
      f"Training memory:   about {_format_bytes(sum(memory.values()))} ("
      + ", ".join(f"{name} {_format_bytes(n)}" for name, n in memory.items())
      + ")",
      f"State:             {_format_bytes(state_bytes(config))} per batch element, at any context "
      "length",
    ]
  )


def describe_run(workdir: pathlib.Path) -> str:
  """Returns the progress of the run in a directory, and its best validation."""
  _, train_cfg = run_directory.load_config(workdir)
  n_update, status = run_directory.latest_step(workdir), best_checkpoint.read_validations(workdir)
  best = "no validation with a finite loss"
  if status.best_step >= 0:
    best = f"{measures.describe(status.known_metrics)}, after {status.best_step:,} updates"
  return "\n".join(
    [
      f"Run:               {workdir}",
      f"Updates:           {n_update:,} of {train_cfg.n_update:,}",
      f"Best validation:   {best}",
    ]
  )


def describe_data(split: str, statistics: SplitStatistics, *, has_words: bool = True) -> str:
  """Returns one line with the statistics of a split.

  Args:
    split: name of the split.
    statistics: counts made when the split was encoded.
    has_words: whether to include the number of words; False for images.
  """
  s = statistics
  words = f"{s.n_word:>13,} words " if has_words else ""
  return (
    f"  {split:<11}{s.n_token:>15,} tokens {s.n_document:>9,} documents {s.n_byte:>15,} bytes "
    f"{words}  unigram entropy {s.unigram_entropy:.3f} bits per token, "
    f"{s.unigram_entropy * s.n_token / s.n_byte:.3f} bits per byte"
  )


def _settings(config: TransformerConfig | TrainConfig) -> list[str]:
  """Returns one line per field of a configuration."""
  return [
    f"  {field.name:<18}{getattr(config, field.name)}" for field in dataclasses.fields(config)
  ]


def _format_bytes(n: int) -> str:
  return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
