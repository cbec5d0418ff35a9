"""Inputs of `vq_attention`, and its comparison with the reference."""

import jax
import jax.numpy as jnp
import numpy as np

import tvq_haiku as tvq

B, T, K, V, S = 2, 24, 4, 6, 5
SHORT = 12
DIVISORS = [1, 2, 3, 4, 6, 12]
ALL_BLOCKS_AT_ONCE = ["serial", "matmul", "assoc_scan"]
REDUCTIONS = ["scan", *ALL_BLOCKS_AT_ONCE]
DOCUMENTS = jnp.array([[0] * 3 + [4] * 15 + [7] * 6, [2] * 20 + [3] + [5] * 3], jnp.int32)


def make_inputs(*, heads=1, kv_heads=1, length=T, mem_len=4, seed=0, n_code=S, is_causal=True):
  keys = jax.random.split(jax.random.key(seed), 7)
  normal = jax.random.normal
  arrays = dict(
    q=normal(keys[0], (B, length, heads, K)),
    k=normal(keys[1], (B, length, kv_heads, K)),
    v=normal(keys[2], (B, length, kv_heads, V)),
  )
  distances = mem_len + 1 if is_causal else 2 * mem_len + 1
  biases = dict(
    relative_keys=normal(keys[4], (distances, kv_heads, K)),
    content_bias=normal(keys[5], (heads, K)),
    position_bias=normal(keys[6], (heads, K)),
  )
  codebook = normal(keys[3], (kv_heads, n_code, K))
  return arrays, codebook, biases


vq_attention = jax.jit(
  tvq.vq_attention,
  static_argnames=(
    "mem_len",
    "block_len",
    "reduction",
    "is_causal",
    "scale",
    "agg_cache",
    "grad_thru_cache",
    "remat",
  ),
)


def cold_state(*, kv_heads=1, mem_len=4, n_code=S, batch=B):
  return tvq.initial_attention_state(
    batch_size=batch, n_kv_head=kv_heads, n_code=n_code, mem_len=mem_len, d_k=K, d_v=V
  )


def tokens_of(arrays, start, stop):
  return {name: x[:, start:stop] for name, x in arrays.items()}


def check_against_reference(
  arrays, codebook, biases, *, mem_len, block_len, reduction="scan", remat=False, **settings
):
  """Compares values and gradients of `vq_attention` with those of the reference."""
  weight = jax.random.normal(jax.random.key(9), (*arrays["q"].shape[:3], V))
  if "lengths" in settings:  # outputs of padding are undefined
    weight *= (jnp.arange(weight.shape[1]) < settings["lengths"][:, None])[..., None, None]

  def ours(arrays, biases):
    out = tvq.vq_attention(
      **arrays,
      codebook=codebook,
      mem_len=mem_len,
      block_len=block_len,
      reduction=reduction,
      remat=remat,
      **biases,
      **settings,
    )
    return jnp.sum(weight * out.values), jnp.where(weight == 0.0, 0.0, out.values)

  def reference(arrays, biases):
    values = tvq.reference.quadratic_attention(
      **arrays,
      codebook=codebook,
      mem_len=mem_len,
      block_len=min(block_len, weight.shape[1]),
      **biases,
      **settings,
    )
    return jnp.sum(weight * values), jnp.where(weight == 0.0, 0.0, values)

  (got, values), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(
    arrays, biases
  )
  # Without jit, its small operations are compiled once for all tests.
  (want, expected), expected_gradients = jax.value_and_grad(
    reference, argnums=(0, 1), has_aux=True
  )(arrays, biases)
  np.testing.assert_allclose(values, expected, atol=1e-5)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    reference = dict(jax.tree_util.tree_leaves_with_path(expected_gradients))[path]
    assert float(jnp.abs(reference).max()) > 0.0 or weight.shape[1] == 1, path
    np.testing.assert_allclose(gradient, reference, atol=2e-5, err_msg=str(path))
