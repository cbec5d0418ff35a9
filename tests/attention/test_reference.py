"""The two forms of the reference equal each other, and softmax attention where keys are codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq

from attention_helpers import SHORT, make_inputs


@pytest.mark.parametrize("mem_len", [1, 4, 40])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 2)])
def test_recurrent_equals_quadratic(heads, kv_heads, mem_len):
  arrays, codebook, biases = make_inputs(
    heads=heads, kv_heads=kv_heads, length=SHORT, mem_len=mem_len
  )
  quadratic, recurrent = (
    attention(**arrays, codebook=codebook, mem_len=mem_len, **biases)
    for attention in (tvq.reference.quadratic_attention, tvq.reference.recurrent_attention)
  )
  np.testing.assert_allclose(recurrent, quadratic, atol=1e-5)


def test_keys_that_are_codes_give_softmax_attention():
  rng = jax.random.split(jax.random.key(0), 3)
  codebook = jax.random.normal(rng[0], (1, 8, 4))
  k = codebook[:, jax.random.randint(rng[1], (10,), 0, 8)][:, :, None]  # [1, 10, 1, 4]
  q = jax.random.normal(rng[2], (1, 10, 1, 4))
  got = tvq.reference.quadratic_attention(q, k, q, codebook, mem_len=2)
  want = jax.nn.dot_product_attention(q, k, q, is_causal=True)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_quantize_takes_the_nearest_code_and_passes_the_gradient_to_the_key():
  k = jnp.array([[[[0.2]], [[0.9]]]])
  codes, k_hat = tvq.reference.quantize(k, jnp.array([[[0.0], [1.0]]]))
  assert codes.ravel().tolist() == [0, 1]
  np.testing.assert_allclose(k_hat.ravel(), [0.0, 1.0], atol=1e-6)
  codebook = jnp.array([[[0.0], [1.0]]])
  gradient = jax.grad(lambda k: jnp.sum(3.0 * tvq.reference.quantize(k, codebook)[1]))(k)
  np.testing.assert_array_equal(gradient, jnp.full_like(k, 3.0))


def test_keys_outside_of_the_window_get_no_gradient():
  arrays, codebook, biases = make_inputs(length=SHORT, mem_len=1)

  def last_output(k):
    out = tvq.reference.quadratic_attention(
      **{**arrays, "k": k}, codebook=codebook, mem_len=1, block_len=3, **biases
    )
    return jnp.sum(out[:, -1])

  gradient = jax.grad(last_output)(arrays["k"])
  assert not gradient[:, :8].any() and gradient[:, 8:].any()
