"""Metrics of the vector quantizer: use and spread of the codes, and quantization error.

Every metric is a float32 scalar without gradient. The names with `c_`, `relative_err_` and `vec_`
are those of the paper's code. Letters: B batch, T tokens, G key/value heads, S codes, K key width.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.types import Array, Params


def _min_max_mean(name: str, values: Array) -> dict[str, Array]:
  """Returns minimum, maximum and mean over the last axis, averaged over the other axes."""
  return {
    f"{name}_min": jnp.mean(jnp.min(values, axis=-1)),
    f"{name}_max": jnp.mean(jnp.max(values, axis=-1)),
    f"{name}_mean": jnp.mean(values),
  }


def _usage_entropy(counts: Array) -> Array:
  """Returns the entropy in nats of the distribution of keys over codes: [..., S] -> [...]."""
  probabilities = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1e-30)
  return -jnp.sum(jax.scipy.special.xlogy(probabilities, probabilities), axis=-1)


def codebook_metrics(codebook: Array, counts: Array) -> dict[str, Array]:
  """Measures how far apart the codes of an attention are, and how evenly they are used.

  Args:
    codebook: [G, S, K] codes.
    counts: [G, S] moving average of the number of keys per update that each code gets.

  Returns:
    Averages over heads. `c_dist_*` and `c_sim_*`: Euclidean distance and cosine similarity of all
    pairs of codes. `c_norm_*`: norms of the codes. `c_usage_*`: `counts`. All four come as `_min`,
    `_max` and `_mean`. `c_entropy`: entropy of the usage in nats. `c_thresh_oob`: number of codes
    with less than one key per update.
  """
  dims = chex.Dimensions()
  dims["GSK"] = codebook.shape
  dims["GS"] = counts.shape
  codebook, counts = jax.lax.stop_gradient((codebook, counts))
  norms = jnp.linalg.norm(codebook, axis=-1)
  dots = jnp.einsum("gsk,gtk->gst", codebook, codebook, precision=jax.lax.Precision.HIGHEST)
  squares = norms[:, :, None] ** 2 + norms[:, None] ** 2 - 2.0 * dots
  cosines = dots / jnp.maximum(norms[:, :, None] * norms[:, None], 1e-30)
  # A single code has no pair, so it is paired with itself: an empty minimum is undefined.
  n_code = dims.S
  pairs = np.tril_indices(n_code, k=-1 if n_code > 1 else 0)
  n_rare = jnp.sum(counts < 1.0, axis=-1).astype(jnp.float32)
  return {
    **_min_max_mean("c_dist", jnp.sqrt(jnp.maximum(squares, 0.0))[:, *pairs]),
    **_min_max_mean("c_sim", cosines[:, *pairs]),
    **_min_max_mean("c_norm", norms),
    **_min_max_mean("c_usage", counts),
    "c_entropy": jnp.mean(_usage_entropy(counts)),
    "c_thresh_oob": jnp.mean(n_rare),
  }


@jax.jit
def codebook_usage(params: Params) -> dict[str, Array]:
  """Measures how evenly the codes are used.

  It reads only parameters, and is therefore cheap enough for every log line.

  Args:
    params: parameters of the model.

  Returns:
    Averages over all codebooks. `code_perplexity`: exponential of the entropy of the usage, at
    most S. `code_use`: fraction of the codes with at least one key per update. Empty if the model
    has no quantizer.
  """
  counts = [
    leaves["c_count"].reshape(-1, leaves["c_count"].shape[-1])
    for leaves in params.values()
    if "c_count" in leaves
  ]
  if not counts:
    return {}
  counts = jnp.concatenate(counts)  # [N·(attentions per layer)·G, S]
  return {
    "code_perplexity": jnp.mean(jnp.exp(_usage_entropy(counts))),
    "code_use": jnp.mean((counts >= 1.0).astype(jnp.float32)),
  }


def quantization_metrics(
  k: Array, quantized: Array, is_token: Array, block_len: int
) -> dict[str, Array]:
  """Measures the relative quantization error |k - C_z| / |k| and the norms of keys and codes.

  Args:
    k: [B, T, G, K] keys.
    quantized: [B, T, G, K] their codes C_z.
    is_token: [B, T] bool; False for padding, which is excluded.
    block_len: L.

  Returns:
    `relative_err_min` and `relative_err_max`: minimum and maximum over each block of L tokens,
    averaged over blocks. `relative_err_mean`, `vec_norm_mean` (|k|) and `vec_hat_norm_mean`
    (|C_z|): means over tokens.
  """
  chex.assert_equal_shape([k, quantized])
  B, T, G, _ = k.shape
  chex.assert_shape(is_token, (B, T))
  k, quantized = jax.lax.stop_gradient((k, quantized))

  def norm(x: Array) -> Array:
    """Returns |x| of every token, NaN for padding: [B, T, G, K] -> [B, T, G]."""
    return jnp.where(is_token[..., None], jnp.linalg.norm(x, axis=-1), jnp.nan)

  errors = norm(k - quantized) / jnp.maximum(norm(k), 1e-30)
  blocks = jnp.pad(errors, [(0, 0), (0, -T % block_len), (0, 0)], constant_values=jnp.nan)
  blocks = blocks.reshape(B, -1, block_len, G)
  return {
    "relative_err_min": jnp.nanmean(jnp.nanmin(blocks, axis=2)),
    "relative_err_max": jnp.nanmean(jnp.nanmax(blocks, axis=2)),
    "relative_err_mean": jnp.nanmean(errors),
    "vec_norm_mean": jnp.nanmean(norm(k)),
    "vec_hat_norm_mean": jnp.nanmean(norm(quantized)),
  }
