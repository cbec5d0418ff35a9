"""How much arithmetic a model needs, to compare what is measured with."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig


def forward_multiply_adds(config: TransformerConfig, seq_len: int) -> int:
  """Multiply-adds of the matrix products of one forward pass over one sequence from a cold start.

  Counted are projections, distances to codes, scores (content, position, codes), weighted values
  and logits, with windows of M + L keys whether masked or not. Not counted are elementwise
  operations, sums of values by code (additions, even if done as a product), and anything computed
  again for the backward pass; so a training step's model FLOPs are 3 * 2 times this number. Full
  attention is counted by the pairs that are not masked.

  >>> config = TransformerConfig(n_vocab=259)
  >>> forward_multiply_adds(config, 2048) // 2048  # multiply-adds per token
  3679264
  """
  c = config
  D, K, V, H, G = c.d_model, c.d_k, c.d_v, c.n_head, c.kv_heads
  values_out = H * V
  projections = D * (H * K + G * K + G * V + values_out + (values_out if c.gated else 0))
  relative = (c.mem_len if c.causal else 2 * c.mem_len) + 1
  if c.attn_type == "full":
    reach = min(seq_len, c.mem_len + 1)
    seen = (seq_len * reach - reach * (reach - 1) / 2) / seq_len if c.causal else seq_len
    attention = H * seen * (2 * K + V)
  else:
    window = c.block_len + c.mem_len * (1 if c.causal else 2)
    codes = c.n_code if c.agg_cache else 0
    values = window + codes * (1 if c.causal else 2)
    attention = G * c.n_code * K + H * ((window + codes + relative) * K + values * V)
  layer = (2 if c.gated else 1) * (seq_len * (projections + attention) + relative * D * G * K)
  if not c.gated:
    layer += seq_len * 2 * D * c.mlp_width
  return int(c.n_layer * layer + seq_len * D * c.n_vocab)


def training_flops(config: TransformerConfig, seq_len: int) -> float:
  """FLOPs of a training step per token: 2 for each multiply-add, and twice as many going back.

  >>> training_flops(TransformerConfig(n_vocab=259), 2048)
  22075584.0
  """
  return 6.0 * (forward_multiply_adds(config, seq_len) // seq_len)


def measured_peak(dtype: jnp.dtype, *, size: int | None = None) -> float:
  """FLOP/s of a square matrix product on one device: what a training step is compared with.

  Args:
    dtype: of the factors.
    size: of the matrices; None: 2048 on a CPU, 8192 elsewhere.
  """
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  times = []
  for _ in range(3):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2.0 * size**3 / statistics.median(times)
