"""Rematerialization: which activations are kept for the backward pass, and which are recomputed.

| `remat` | kept for the backward pass                        | recomputed                         |
|---------|---------------------------------------------------|------------------------------------|
| `none`  | all activations but those in the next column      | gates and SiLUs; scores of `full`  |
| `block` | the same, without attention scores and weights    | also the attention of each block   |
| `dots`  | inputs of layers; products without a batch axis,  | everything else inside a layer     |
|         | such as projections                               |                                    |
| `layer` | inputs of layers                                  | everything inside a layer          |
| `auto`  | as `none` if that fits into device memory, else as `layer`                             |

With `reduction='scan'`, `block` also recomputes the cache of each block.
"""

from __future__ import annotations

from collections.abc import Callable
import os
from typing import Any

import haiku as hk
import jax

from tvq_haiku.config import TransformerConfig

# `remat` -> the checkpoint policy of a layer; None saves no intermediate result. `block` is absent,
# because the attention layer applies it.
_SAVED_IN_LAYER = {"layer": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}

# Fraction of the device memory that activations may use. It is lower on accelerators, because
# parameters, gradients and optimizer state take a larger part of their memory.
_CPU_FRACTION = 0.65
_ACCELERATOR_FRACTION = 0.4

_DEFAULT_MEMORY_BYTES = 16 * 2**30  # for devices that do not report their memory


def remat_layer(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
  """Returns `layer`, a function that calls Haiku modules, rematerialized according to `remat`."""
  if remat in _SAVED_IN_LAYER:
    return hk.remat(layer, policy=_SAVED_IN_LAYER[remat])
  return layer


def resolve_remat(config: TransformerConfig, n_token: int) -> str:
  """Returns `config.remat`, with 'auto' replaced by 'none' or 'layer'.

  Args:
    config: configuration of the model.
    n_token: number of tokens B·T per device and update.

  Returns:
    For 'auto', 'none' if the estimated activations fit into the memory of the first device, else
    'layer'; for all other values, the value itself.
  """
  if config.remat != "auto":
    return config.remat
  device = jax.devices()[0]
  fraction = _CPU_FRACTION if device.platform == "cpu" else _ACCELERATOR_FRACTION
  fits = activation_bytes(config, n_token) <= fraction * device_memory_bytes(device)
  return "none" if fits else "layer"


def activation_bytes(config: TransformerConfig, n_token: int) -> int:
  """Estimates the activation memory kept for the backward pass without remat, in bytes.

  Logits are not included. In the formula, `size` is multiplied by numbers of arrays in the compute
  dtype; 24·K and 16·K are bytes.

  Args:
    config: configuration of the model.
    n_token: number of tokens B·T of one update.

  >>> activation_bytes(TransformerConfig(n_vocab=259), 2048) // 2**20
  228
  """
  c = config
  per_token = sum(_attention_bytes(attention, n_token) for attention in c.attention_configs)
  if not c.gated:
    per_token += c.compute_dtype.itemsize * (2 * c.mlp_width + 4 * c.d_model)
  return c.n_layer * n_token * per_token


def _attention_bytes(config: TransformerConfig, n_token: int) -> int:
  """Estimates the bytes per token that one attention keeps: see `activation_bytes`.

  Args:
    config: one of the `attention_configs`.
    n_token: number of tokens B·T of one update.
  """
  c = config
  size = c.compute_dtype.itemsize
  n_score = 0  # per query; full attention recomputes its scores in any case
  if c.attn_type == "vq":
    n_score = c.mem_len + min(c.block_len, n_token)
    if c.agg_cache:
      # One score per code, and the share of each token in the cache [S, V] of its block.
      n_score += c.n_code * (1 + c.d_v // c.block_len)
  per_query_head = 2 * size * n_score + 24 * c.d_k + 3 * size * c.d_v
  per_kv_head = 16 * c.d_k + 3 * size * c.d_v
  return c.n_head * per_query_head + c.kv_heads * per_kv_head + 4 * size * c.d_model


def device_memory_bytes(device: jax.Device) -> int:
  """Returns the memory that JAX may use on `device`; on a CPU, the machine's physical memory."""
  if device.platform == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  stats = device.memory_stats() or {}
  return stats.get("bytes_limit", _DEFAULT_MEMORY_BYTES)
