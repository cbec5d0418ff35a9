"""Inputs of `vq_attention`, and a comparison of its results with the reference."""

import jax
import jax.numpy as jnp
import numpy as np

import tvq_haiku as tvq

B, T, K, V, S = 2, 24, 4, 6, 5
SHORT = 12
DIVISORS = [1, 3, 4, 12]
ALL_BLOCKS_AT_ONCE = ["serial", "matmul", "assoc_scan"]
REDUCTIONS = ["scan", *ALL_BLOCKS_AT_ONCE]
DOCUMENTS = jnp.array([[0] * 3 + [4] * 15 + [7] * 6, [2] * 20 + [3] + [5] * 3], jnp.int32)


def make_inputs(*, heads=1, kv_heads=1, length=T, mem_len=4, seed=0, n_code=S, is_causal=True):
  """Returns random q, k and v by name, a random codebook, and random biases by name."""
  rngs = jax.random.split(jax.random.key(seed), 7)
  normal = jax.random.normal
  arrays = dict(
    q=normal(rngs[0], (B, length, heads, K)),
    k=normal(rngs[1], (B, length, kv_heads, K)),
    v=normal(rngs[2], (B, length, kv_heads, V)),
  )
  n_distance = mem_len + 1 if is_causal else 2 * mem_len + 1
  biases = dict(
    relative_keys=normal(rngs[4], (n_distance, kv_heads, K)),
    content_bias=normal(rngs[5], (heads, K)),
    position_bias=normal(rngs[6], (heads, K)),
  )
  codebook = normal(rngs[3], (kv_heads, n_code, K))
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
  """Returns the state before the first token."""
  return tvq.initial_attention_state(
    batch_size=batch, n_kv_head=kv_heads, n_code=n_code, mem_len=mem_len, d_k=K, d_v=V
  )


def tokens_of(arrays, start, stop):
  """Returns the tokens from `start` to `stop` of q, k and v."""
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

  (got, got_values), got_gradients = jax.jit(
    jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)
  )(arrays, biases)
  # The reference is not jitted: its small operations are compiled once and shared by all tests.
  (want, want_values), want_gradients = jax.value_and_grad(reference, argnums=(0, 1), has_aux=True)(
    arrays, biases
  )
  np.testing.assert_allclose(got_values, want_values, atol=1e-5)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  want_by_path = dict(jax.tree_util.tree_leaves_with_path(want_gradients))
  for path, gradient in jax.tree_util.tree_leaves_with_path(got_gradients):
    want_gradient = want_by_path[path]
    assert float(jnp.abs(want_gradient).max()) > 0.0 or weight.shape[1] == 1, path
    np.testing.assert_allclose(gradient, want_gradient, atol=2e-5, err_msg=str(path))
