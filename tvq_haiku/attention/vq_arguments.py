"""Checks of the arguments of `vq_attention`; the errors name the argument.

Letters: B batch, T tokens, H query heads, G key/value heads, S codes, K key width, V value width,
M memory length.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np

from tvq_haiku.attention.state import AttentionState
from tvq_haiku.config import REDUCTIONS
from tvq_haiku.types import Array
from tvq_haiku.utils import checks


def check_arrays(
  q: Array,
  k: Array,
  v: Array,
  codebook: Array,
  segment_ids: Array | None,
  mask: Array | None,
  lengths: Array | None,
  content_bias: Array | None,
  position_bias: Array | None,
) -> chex.Dimensions:
  """Checks the array arguments against each other.

  Args:
    q: [B, T, H, K] floating.
    k: [B, T, G, K] floating.
    v: [B, T, G, V] floating.
    codebook: [G, S, K] floating.
    segment_ids: [B, T] integer, or None.
    mask: [B, T] bool, or None.
    lengths: [B] integer, or None; not together with `mask`.
    content_bias: [H, K] floating, or None.
    position_bias: [H, K] floating, or None.

  Returns:
    The sizes B, T, H, K, G, V and S.

  Raises:
    ValueError, TypeError: a shape or dtype is not allowed; the message names the array.
  """
  real, dims = jnp.floating, chex.Dimensions()
  try:
    checks.check_arrays(
      "vq_attention",
      dims,
      q=(q, "BTHK", real),
      k=(k, "BTGK", real),
      v=(v, "BTGV", real),
      codebook=(codebook, "GSK", real),
    )
  except ValueError as error:
    raise ValueError(
      f"{error} Heads are the third axis of q, k and v: to arrays [B, heads, T, K], apply "
      "swapaxes(1, 2). The codebook has one entry on its first axis for each head of k."
    ) from None
  checks.check_arrays(
    "vq_attention",
    dims,
    segment_ids=(segment_ids, "BT", jnp.integer),
    mask=(mask, "BT", jnp.bool),
    lengths=(lengths, "B", jnp.integer),
    content_bias=(content_bias, "HK", real),
    position_bias=(position_bias, "HK", real),
  )
  checks.check_heads("vq_attention", dims.H, dims.G)
  if mask is not None and lengths is not None:
    raise ValueError("vq_attention: give a mask or lengths, not both.")
  return dims


def to_single_precision(*arrays: Array | None) -> list[Array | None]:
  """Converts float64 arrays, which JAX only has with JAX_ENABLE_X64, to float32."""
  return [x.astype(jnp.float32) if x is not None and x.dtype == jnp.float64 else x for x in arrays]


def check_settings(
  dims: chex.Dimensions, mem_len: int | None, block_len: int, reduction: str
) -> None:
  """Checks the settings.

  Args:
    dims: sizes of the arrays.
    mem_len: at least 1, or None.
    block_len: at least 1.
    reduction: one of `config.REDUCTIONS`.

  Raises:
    ValueError: a size or setting is out of range.
  """
  for name, n in (("B", dims.B), ("T", dims.T), ("block_len", block_len), ("mem_len", mem_len)):
    if n is not None and (not isinstance(n, (int, np.integer)) or n < 1):
      raise ValueError(f"vq_attention: {name}={n!r} must be an integer, at least 1.")
  if reduction not in REDUCTIONS:
    raise ValueError(f"vq_attention: reduction={reduction!r} must be one of {REDUCTIONS}.")


def check_state(
  state: AttentionState, dims: chex.Dimensions, mem_len: int | None, is_causal: bool
) -> None:
  """Checks that the state fits the arrays and settings; adds M to `dims`.

  Args:
    state: the state that the caller passed.
    dims: sizes of the arrays.
    mem_len: M, or None.
    is_causal: must be True, because an encoder has no state.

  Raises:
    ValueError: the attention is an encoder, or a size does not fit.
    TypeError: `state` is not an AttentionState, or a dtype does not fit.
  """
  if not is_causal:
    raise ValueError("vq_attention: an encoder (is_causal=False) takes no state.")
  if not isinstance(state, AttentionState):
    got = type(state).__name__
    raise TypeError(f"vq_attention: state must be an AttentionState, got {got}.")
  M = state.memory_docs.shape[-1]
  if mem_len not in (None, M):
    raise ValueError(f"vq_attention: mem_len={mem_len}, but the state has M={M}.")
  dims.M = M
  real = jnp.floating
  fields = {
    "state.memory_keys": (state.memory_keys, "BGMK", real),
    "state.memory_values": (state.memory_values, "BGMV", real),
    "state.cache_means": (state.cache_means, "BGSV", real),
  }
  checks.check_arrays("vq_attention", dims, **fields)


def check_relative_keys(
  relative_keys: Array | None, dims: chex.Dimensions, mem_len: int, is_causal: bool
) -> None:
  """Checks that there is one relative key for each distance up to M.

  Args:
    relative_keys: [M+1, G, K], or [2M+1, G, K] for an encoder, or None.
    dims: sizes of the arrays.
    mem_len: M.
    is_causal: False for an encoder.

  Raises:
    ValueError, TypeError: `relative_keys` does not fit.
  """
  n_distance = ("M+1", mem_len + 1) if is_causal else ("2M+1", 2 * mem_len + 1)
  axes = (n_distance, "G", "K")
  checks.check_arrays("vq_attention", dims, relative_keys=(relative_keys, axes, jnp.floating))
