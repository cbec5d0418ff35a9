"""Metrics of the vector quantizer."""

import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.model import codebook_metrics


def random_codebook(n_head, n_code, width, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((n_head, n_code, width)), jnp.float32)


def test_codebook_metrics_equal_loops_over_pairs_of_codes():
  codebook = random_codebook(2, 5, 3)
  counts = jnp.array([[0.0, 1.0, 3.0, 0.5, 4.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
  expected = {name: [] for name in ("dist", "sim", "norm", "usage")}
  for codes, usage in zip(np.asarray(codebook, np.float64), counts, strict=True):
    norms = np.linalg.norm(codes, axis=-1)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    expected["dist"].append([np.linalg.norm(codes[i] - codes[j]) for i, j in pairs])
    expected["sim"].append([codes[i] @ codes[j] / (norms[i] * norms[j]) for i, j in pairs])
    expected["norm"].append(norms)
    expected["usage"].append(usage)
  metrics = codebook_metrics.codebook_metrics(codebook, counts)
  for name, values in expected.items():
    for reduction in ("min", "max", "mean"):
      value = np.mean([getattr(np, reduction)(of_head) for of_head in values])
      np.testing.assert_allclose(metrics[f"c_{name}_{reduction}"], value, rtol=1e-5, err_msg=name)
  shares = np.array([1.0, 3.0, 0.5, 4.0]) / 8.5
  entropy = (-np.sum(shares * np.log(shares)) + np.log(5)) / 2
  np.testing.assert_allclose(metrics["c_entropy"], entropy, rtol=1e-6)
  assert float(metrics["c_thresh_oob"]) == 1.0  # two rare codes in one head, none in the other


@pytest.mark.parametrize("n_code", [1, 5])
def test_codebook_metrics_are_finite_if_one_code_gets_all_keys(n_code):
  counts = jnp.zeros((3, n_code)).at[:, 0].set(2.0)
  metrics = codebook_metrics.codebook_metrics(random_codebook(3, n_code, 4), counts)
  assert all(value.shape == () and jnp.isfinite(value) for value in metrics.values())
  assert float(metrics["c_thresh_oob"]) == n_code - 1
  assert float(metrics["c_entropy"]) == 0.0


def test_codebook_usage_averages_over_all_codebooks_of_the_parameters():
  uniform, single = jnp.full((1, 1, 4), 2.0), jnp.zeros((1, 1, 4)).at[..., 0].set(8.0)
  params = {
    "layers/attention_1/quantizer": {"c_count": jnp.concatenate([uniform, single])},  # [N, G, S]
    "layers/attention_2/quantizer": {"c_count": jnp.concatenate([uniform, uniform])},
    "layers/attention_1/out": {"kernel": jnp.ones((2, 3, 3))},
  }
  usage = codebook_metrics.codebook_usage(params)
  np.testing.assert_allclose(usage["code_perplexity"], (4 + 1 + 4 + 4) / 4, rtol=1e-6)
  np.testing.assert_allclose(usage["code_use"], (1 + 1 / 4 + 1 + 1) / 4, rtol=1e-6)
  assert codebook_metrics.codebook_usage({"out": {"kernel": jnp.ones((3, 3))}}) == {}


def test_quantization_metrics_of_known_errors():
  k = jnp.array([3.0, 4.0])[None, None, None] * jnp.ones((1, 4, 1, 2))  # norm 5
  errors = jnp.array([0.0, 5.0, 10.0, 2.5])  # relative: 0, 1, 2, 1/2
  quantized = k + errors[None, :, None, None] * jnp.array([1.0, 0.0])
  metrics = codebook_metrics.quantization_metrics(k, quantized, jnp.ones((1, 4), bool), 2)
  expected = {
    "relative_err_min": (0.0 + 0.5) / 2,
    "relative_err_max": (1.0 + 2.0) / 2,
    "relative_err_mean": (0.0 + 1.0 + 2.0 + 0.5) / 4,
    "vec_norm_mean": 5.0,
    "vec_hat_norm_mean": np.mean([np.hypot(3.0 + e, 4.0) for e in errors]),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_quantization_metrics_exclude_padding():
  k, quantized = random_codebook(2, 9 * 3, 4).reshape(2, 9, 3, 4), jnp.zeros((2, 9, 3, 4))
  tokens_only = codebook_metrics.quantization_metrics(
    k[:, :6], quantized[:, :6], jnp.ones((2, 6), bool), 4
  )
  is_token = jnp.broadcast_to(jnp.arange(9) < 6, (2, 9))
  padded = codebook_metrics.quantization_metrics(k.at[:, 6:].set(1e9), quantized, is_token, 4)
  for name, value in tokens_only.items():
    np.testing.assert_allclose(padded[name], value, rtol=1e-6, err_msg=name)
