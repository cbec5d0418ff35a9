"""Gradients accumulated over microbatches are those of the complete batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.training import gradients

import helpers

pytestmark = pytest.mark.slow

CONFIG = helpers.tiny(n_layer=2)


def make_inputs(batch_size=4):
  tokens = helpers.random_tokens(CONFIG, batch_size, 17)
  mask = np.ones((batch_size, 16), np.float32)
  mask[1, 3:] = 0.0  # microbatches have different weights
  batch = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=mask)
  params = helpers.random_params(CONFIG)
  state = tvq.initial_state(CONFIG, batch_size)
  _, aux = jax.jit(lambda batch: tvq.training_loss(params, CONFIG, None, batch, state))(batch)
  return params, jax.tree.map(jnp.asarray, batch), aux.state


def compute(n_microbatch, *inputs, config=CONFIG):
  params, batch, state = inputs
  return jax.jit(
    lambda *args: gradients.loss_gradients(
      args[0],
      config,
      jax.random.key(0),
      *args[1:],
      n_microbatch=n_microbatch,
      sequence_rng=jax.random.key(1),
      with_metrics=True,
    )
  )(params, batch, state)


@pytest.mark.parametrize("n_microbatch", [2, 4])
def test_microbatches_give_the_result_of_the_complete_batch(n_microbatch):
  inputs = make_inputs()
  want, got = compute(1, *inputs), compute(n_microbatch, *inputs)
  np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
  np.testing.assert_allclose(got.aux.loss_lm, want.aux.loss_lm, rtol=1e-5)
  np.testing.assert_allclose(got.aux.loss_commit, want.aux.loss_commit, rtol=1e-5)
  helpers.assert_trees_close(got.aux.state, want.aux.state)
  helpers.assert_trees_close(got.gradients, want.gradients)
  assert got.aux.metrics.keys() == want.aux.metrics.keys()


def test_the_codebook_gradient_is_its_exponential_moving_average():
  """A step of size 1 leads to γ p + (1-γ) s, with s the sum over all keys of the batch."""
  params, batch, state = make_inputs()
  name = "transformer/layers/attention_1/quantizer"
  after = {
    n: params[name]["c_count"] - compute(n, params, batch, state).gradients[name]["c_count"]
    for n in (1, 4)
  }
  gamma = CONFIG.c_gamma
  n_token = float(batch["loss_mask"].sum())
  for counts in after.values():  # every unmasked token counts once, in each of the 2 layers
    sums = ((counts - gamma * params[name]["c_count"]) / (1.0 - gamma)).sum(axis=(1, 2))
    np.testing.assert_allclose(sums, [n_token, n_token], rtol=1e-3)


def test_each_microbatch_has_its_own_dropout_masks():
  config = CONFIG.replace(p_dropres=0.5)
  params, batch, _ = make_inputs()
  batch = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (2, *x.shape[1:])), batch)  # equal
  loss = jax.jit(
    lambda batch, rng, n: (
      gradients.loss_gradients(
        params,
        config,
        rng,
        batch,
        tvq.initial_state(config, batch["inputs"].shape[0]),
        n_microbatch=n,
      ).loss
    ),
    static_argnums=2,
  )
  rng = jax.random.key(0)
  single = jax.tree.map(lambda x: x[:1], batch)
  parts = [float(loss(single, jax.random.fold_in(rng, i), 1)) for i in range(2)]
  assert abs(parts[0] - parts[1]) > 1e-3
  np.testing.assert_allclose(loss(batch, rng, 2), np.mean(parts), rtol=1e-5)


def test_a_batch_that_microbatches_do_not_divide_is_rejected():
  params, batch, state = make_inputs()
  with pytest.raises(AssertionError):
    gradients.loss_gradients(params, CONFIG, jax.random.key(0), batch, state, n_microbatch=3)


def test_gradients_have_the_dtypes_of_the_parameters_under_a_bfloat16_policy():
  params, batch, state = make_inputs()
  config = CONFIG.replace(precision="bfloat16")
  state = tvq.initial_state(config, 4)
  for n in (1, 2):
    result = compute(n, params, batch, state, config=config)
    assert {x.dtype for x in jax.tree.leaves(result.gradients)} == {jnp.dtype("float32")}
    assert result.loss.dtype == result.aux.loss_lm.dtype == jnp.float32
