"""How much a backward pass would keep, and what to compute again instead."""

from __future__ import annotations

import os

import jax

from tvq_haiku.config import TransformerConfig

# Of the memory, for what a backward pass keeps. On accelerators parameters, gradients and the
# optimizer take more of the rest than they do beside a CPU.
_SHARE = {"cpu": 0.65}
_ELSEWHERE = 0.4


def activation_bytes(config: TransformerConfig, n_token: int) -> int:
  """What the backward pass keeps of the layers when nothing is computed again, about.

  Args:
    config: the model.
    n_token: B·T of one update.

  >>> residual_bytes(TransformerConfig(n_vocab=259), 2048) // 2**20
  228
  """
  c = config
  size = c.compute_dtype.itemsize
  scores = c.mem_len + min(c.block_len, n_token)
  if c.attn_type == "full":
    scores = 0  # computed again in any case
  elif c.agg_cache:
    scores += c.n_code * (1 + c.d_v // max(c.block_len, 1))
  attention = (
    c.n_head * (scores * size * 2 + c.d_k * 24 + c.d_v * size * 3)
    + c.kv_heads * (c.d_k * 16 + c.d_v * size * 3)
    + c.d_model * size * 4
  )
  if c.gated:
    return c.n_layer * n_token * 2 * attention
  return c.n_layer * n_token * (attention + (2 * c.mlp_width + 4 * c.d_model) * size)


def resolve_remat(config: TransformerConfig, n_token: int) -> str:
  """What `remat='auto'` stands for: 'none' where the residuals fit into memory, else 'layer'."""
  if config.remat != "auto":
    return config.remat
  device = jax.devices()[0]
  budget = _SHARE.get(device.platform, _ELSEWHERE) * device_memory_bytes(device)
  return "none" if activation_bytes(config, n_token) <= budget else "layer"


def device_memory_bytes(device: jax.Device) -> int:
  """The memory of a device; of a CPU, that of the machine."""
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  stats = device.memory_stats() or {}
  return stats.get("bytes_limit", 16 * 2**30)
