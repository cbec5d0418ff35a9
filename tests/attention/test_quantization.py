"""Nearest codes, their statistics, and the losses for keys and codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.attention import quantization


def random_keys(seed=0, shape=(2, 9, 3, 4), n_code=5):
  keys = jax.random.split(jax.random.key(seed))
  return (
    jax.random.normal(keys[0], shape),
    jax.random.normal(keys[1], (shape[2], n_code, shape[3])),
  )


def test_nearest_codes_are_nearest():
  k, codebook = random_keys()
  distances = ((k[:, :, :, None] - codebook) ** 2).sum(-1)
  np.testing.assert_array_equal(quantization.nearest_codes(k, codebook), distances.argmin(-1))


def test_look_up_takes_each_head_from_its_own_codebook():
  k, codebook = random_keys()
  codes = quantization.nearest_codes(k, codebook)
  vectors = quantization.look_up(codes, codebook)
  for b, t, g in np.ndindex(codes.shape):
    np.testing.assert_array_equal(vectors[b, t, g], codebook[g, codes[b, t, g]])


def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_the_key():
  k, codebook = random_keys()
  quantized = quantization.look_up(quantization.nearest_codes(k, codebook), codebook)
  value, gradient = jax.value_and_grad(
    lambda k: jnp.sum(jnp.sin(quantization.straight_through(k, quantized)))
  )(k)
  np.testing.assert_allclose(value, jnp.sum(jnp.sin(quantized)), rtol=1e-5)
  np.testing.assert_allclose(gradient, jnp.cos(quantized), atol=1e-5)
  codebook_gradient = jax.grad(
    lambda c: jnp.sum(
      quantization.straight_through(k, quantization.look_up(quantization.nearest_codes(k, c), c))
    )
  )(codebook)
  assert not codebook_gradient.any()


def test_commit_loss_is_a_mean_over_all_tokens_with_a_gradient_for_keys_only():
  k, codebook = random_keys()
  quantized = quantization.look_up(quantization.nearest_codes(k, codebook), codebook)
  mask = jnp.ones((2, 9)).at[1, 4:].set(0.0)
  value, gradients = jax.value_and_grad(quantization.commit_loss, argnums=(0, 1))(
    k, quantized, mask
  )
  squares = ((k - quantized) ** 2).sum((2, 3))
  np.testing.assert_allclose(value, (squares * mask).sum() / 18, rtol=1e-6)
  np.testing.assert_allclose(
    gradients[0], 2 * mask[..., None, None] * (k - quantized) / 18, rtol=1e-5
  )
  assert not gradients[1].any()


def test_code_statistics_count_unmasked_tokens():
  k, codebook = random_keys()
  codes = quantization.nearest_codes(k, codebook)
  mask = jnp.ones((2, 9)).at[0, :3].set(0.0)
  sums, numbers = quantization.code_statistics(k, codes, mask, 5)
  want_sums, want_numbers = np.zeros((3, 5, 4)), np.zeros((3, 5))
  for b, t, g in np.ndindex(codes.shape):
    want_sums[g, codes[b, t, g]] += mask[b, t] * k[b, t, g]
    want_numbers[g, codes[b, t, g]] += mask[b, t]
  np.testing.assert_allclose(sums, want_sums, atol=1e-5)
  np.testing.assert_array_equal(numbers, want_numbers)


@pytest.mark.parametrize(
  "k, codebook, message",
  [
    ((2, 9, 2, 4), (1, 5, 4), r"codebook must have shape \[G=2, S, K=4\], got \(1, 5, 4\)"),
    ((2, 9, 3, 4), (3, 5, 6), r"codebook must have shape \[G=3, S, K=4\], got \(3, 5, 6\)"),
    ((9, 3, 4), (3, 5, 4), r"k must have shape \[B, T, G, K\], got \(9, 3, 4\)"),
  ],
)
def test_a_codebook_of_other_heads_or_widths_is_refused(k, codebook, message):
  with pytest.raises(ValueError, match=message):
    quantization.nearest_codes(jnp.zeros(k), jnp.zeros(codebook))
