"""What a model is and needs, in lines for people to read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data.token_cache import SplitStatistics
from tvq_haiku.evaluation import flops, memory_plan
from tvq_haiku.model import transformer


def count_params(config: TransformerConfig) -> int:
  """How many numbers the model's parameters are.

  >>> n_params(TransformerConfig.enwik8())
  187679750
  """
  return sum(math.prod(x.shape) for x in jax.tree.leaves(transformer.params_shapes(config)))


def state_bytes(config: TransformerConfig) -> int:
  """What the model remembers of one row, at any length of context."""
  return memory_plan.tree_bytes(jax.eval_shape(lambda: transformer.initial_state(config, 1)))


def describe_model(config: TransformerConfig, train_cfg: TrainConfig) -> str:
  """The resolved configuration, and what it amounts to."""
  parts = memory_plan.plan_memory(config, train_cfg).memory
  forward = 2 * flops.forward_multiply_adds(config, train_cfg.sequence_len) / train_cfg.sequence_len
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
      f"FLOPs per token:   {forward:,.0f} forward, "
      f"{flops.training_flops(config, train_cfg.sequence_len):,.0f} in training",
      f"An update:         {tokens:,} tokens; a step: {train_cfg.updates_per_step} updates",
      f"All updates:       {tokens * train_cfg.n_max_step:,} tokens",
      f"Training memory:   about {_size(sum(parts.values()))} ("
      + ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
      + ")",
      f"State:             {_size(state_bytes(config))} a row, at any length of context",
    ]
  )


def describe_data(name: str, facts: SplitStatistics, *, has_words: bool = True) -> str:
  """What was counted in a split; `has_words` if it is one of texts."""
  words = f"{facts.n_word:>13,} words " if has_words else ""
  return (
    f"  {name:<11}{facts.n_token:>15,} tokens {facts.n_document:>9,} documents "
    f"{facts.n_byte:>15,} bytes {words}  unigram entropy {facts.unigram_entropy:.3f} bits a token, "
    f"{facts.unigram_entropy * facts.n_token / facts.n_byte:.3f} a byte"
  )


def _settings(config: Any) -> list[str]:
  return [
    f"  {field.name:<18}{getattr(config, field.name)}" for field in dataclasses.fields(config)
  ]


def _size(n: int) -> str:
  return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
