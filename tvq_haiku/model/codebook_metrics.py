"""How well the codes fit the keys and how evenly they are used: the paper's metrics.

Every value is a float32 scalar, without gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.types import Array


def _summary(name: str, values: Array) -> dict[str, Array]:
  """Least, greatest and mean over the last axis, averaged over the others."""
  return {
    f"{name}_min": jnp.mean(jnp.min(values, axis=-1)),
    f"{name}_max": jnp.mean(jnp.max(values, axis=-1)),
    f"{name}_mean": jnp.mean(values),
  }


def codebook_metrics(codebook: Array, counts: Array) -> dict[str, Array]:
  """Spread of the codes of a head and evenness of their use, averaged over heads.

  Args:
    codebook: [G, S, K].
    counts: [G, S] moving average of the keys that each code gets.

  Returns:
    `c_dist`, `c_sim` (distance and cosine of all pairs of codes), `c_norm` and `c_usage` (the
    counts), each `_min`, `_max`, `_mean`; `c_entropy` of the usage in nats; `c_thresh_oob`, the
    number of codes that get less than one key per update.
  """
  codebook = jax.lax.stop_gradient(codebook)
  counts = jax.lax.stop_gradient(counts)
  norms = jnp.linalg.norm(codebook, axis=-1)
  dots = jnp.einsum("gsk,gtk->gst", codebook, codebook, precision=jax.lax.Precision.HIGHEST)
  squares = norms[:, :, None] ** 2 + norms[:, None] ** 2 - 2.0 * dots
  cosines = dots / jnp.maximum(norms[:, :, None] * norms[:, None], 1e-30)
  # With one code there is no pair: compare it with itself instead of reducing nothing.
  pairs = np.tril_indices(codebook.shape[1], k=-1 if codebook.shape[1] > 1 else 0)
  shares = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1e-30)
  entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1)
  return {
    **_summary("c_dist", jnp.sqrt(jnp.maximum(squares, 0.0))[:, *pairs]),
    **_summary("c_sim", cosines[:, *pairs]),
    **_summary("c_norm", norms),
    **_summary("c_usage", counts),
    "c_entropy": jnp.mean(entropy),
    "c_thresh_oob": jnp.mean(jnp.sum(counts < 1.0, axis=-1).astype(jnp.float32)),
  }


@jax.jit
def codebook_usage(params: Any) -> dict[str, Array]:
  """How evenly the codes are used, from a model's parameters alone: cheap enough for every log line.

  Args:
    params: of the model; without quantizers, the result is empty.

  Returns:
    `code_perplexity` exp(entropy of the moving average of a code's keys), and `code_use`, the share
    of codes that get at least one key per update; means over all codebooks.
  """
  counts = [
    leaves["c_count"].reshape(-1, leaves["c_count"].shape[-1])
    for leaves in params.values()
    if "c_count" in leaves
  ]
  if not counts:
    return {}
  counts = jnp.concatenate(counts)  # [codebooks, S]
  shares = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1e-30)
  entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1)
  return {
    "code_perplexity": jnp.mean(jnp.exp(entropy)),
    "code_use": jnp.mean((counts >= 1.0).astype(jnp.float32)),
  }


def quantization_metrics(
  k: Array, quantized: Array, is_token: Array, block_len: int
) -> dict[str, Array]:
  """Size of the rounding |k - C_z| / |k|; least and greatest are of blocks, then averaged.

  Args:
    k: [B, T, G, K] keys.
    quantized: [B, T, G, K] their codes.
    is_token: [B, T] bool: False for padding, which is left out.
    block_len: L.
  """
  k, quantized = jax.lax.stop_gradient((k, quantized))

  def norm(x: Array) -> Array:
    return jnp.where(is_token[..., None], jnp.linalg.norm(x, axis=-1), jnp.nan)

  errors = norm(k - quantized) / jnp.maximum(norm(k), 1e-30)
  B, T, G = errors.shape
  padding = -T % block_len
  blocks = jnp.pad(errors, [(0, 0), (0, padding), (0, 0)], constant_values=jnp.nan)
  blocks = blocks.reshape(B, -1, block_len, G)
  return {
    "relative_err_min": jnp.nanmean(jnp.nanmin(blocks, axis=2)),
    "relative_err_max": jnp.nanmean(jnp.nanmax(blocks, axis=2)),
    "relative_err_mean": jnp.nanmean(errors),
    "vec_norm_mean": jnp.nanmean(norm(k)),
    "vec_hat_norm_mean": jnp.nanmean(norm(quantized)),
  }
