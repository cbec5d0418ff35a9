"""Arithmetic cost of a model.

Letters: D model width, H query heads, G key/value heads, K key width, V value width, L block
length, M memory length, S codes, N layers, X vocabulary.
"""

from __future__ import annotations

from tvq_haiku.config import TransformerConfig


def forward_multiply_adds(config: TransformerConfig, seq_len: int) -> int:
  """Counts the multiply-adds of the matrix products in a forward pass over one sequence.

  The count includes projections, distances to codes, scores (content, position and codes), weighted
  values and logits. All keys of a window count, even those that are masked; in full attention, only
  the pairs of tokens that are not masked count. The count excludes elementwise operations, sums of
  values by code (they only add, even if they are computed as a product), and rematerialization. A
  training step takes 3 * 2 times this number of FLOPs.

  Args:
    config: configuration of the model.
    seq_len: number of tokens, read from the initial state.

  Returns:
    The number of multiply-adds for all `seq_len` tokens.

  >>> config = TransformerConfig(n_vocab=259)
  >>> forward_multiply_adds(config, 2048) // 2048  # multiply-adds per token
  3679264
  """
  c = config
  D, K, G = c.d_model, c.d_k, c.kv_heads
  width = c.n_head * c.d_v  # width of the values of all heads, and of the gate
  projections = D * (c.n_head * K + G * K + G * c.d_v + width + (width if c.gated else 0))
  layer = 0.0
  for attention in c.attention_configs:
    layer += seq_len * (projections + _attention_multiply_adds(attention, seq_len))
    layer += _n_distance(attention) * D * G * K
  if not c.gated:
    layer += seq_len * 2 * D * c.mlp_width
  return int(c.n_layer * layer + seq_len * D * c.n_vocab)


def _n_distance(config: TransformerConfig) -> int:
  """Returns the number of distances with a relative position bias, for one attention."""
  return (config.mem_len if config.causal else 2 * config.mem_len) + 1


def _attention_multiply_adds(config: TransformerConfig, seq_len: int) -> float:
  """Counts the multiply-adds per token of scores, distances to codes and weighted values.

  Args:
    config: one of the `attention_configs`.
    seq_len: number of tokens.
  """
  c = config
  H, K, V = c.n_head, c.d_k, c.d_v
  if c.attn_type == "full":
    if not c.causal:
      return H * seq_len * (2 * K + V)
    # The first tokens have fewer than M + 1 keys.
    n_key = min(seq_len, c.mem_len + 1)
    mean_keys = (seq_len * n_key - n_key * (n_key - 1) / 2) / seq_len
    return H * mean_keys * (2 * K + V)
  n_side = 1 if c.causal else 2  # an encoder has a memory and a cache on either side
  window = c.block_len + n_side * c.mem_len
  n_code = c.n_code if c.agg_cache else 0
  n_score = window + n_code + _n_distance(config)  # both caches use the same scores
  return c.kv_heads * c.n_code * K + H * (n_score * K + (window + n_side * n_code) * V)


def training_flops(config: TransformerConfig, seq_len: int) -> float:
  """Computes the FLOPs per token of a training step without rematerialization.

  A multiply-add is 2 FLOPs, and the backward pass takes twice as many as the forward pass.

  >>> training_flops(TransformerConfig(n_vocab=259), 2048)
  22075584.0
  """
  return 6.0 * (forward_multiply_adds(config, seq_len) // seq_len)
