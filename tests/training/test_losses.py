"""Weights and values of the training objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.training import losses

import helpers

CONFIG = helpers.RUN.replace(p_dropres=0.0, p_droplyr=0.0)


@pytest.fixture(scope="module")
def loss():
  """`training_loss` of a batch, compiled."""
  params, state = helpers.random_params(CONFIG), tvq.initial_state(CONFIG, 2)
  return jax.jit(lambda batch: tvq.training_loss(params, CONFIG, None, batch, state))


@pytest.fixture(scope="module")
def batch():
  return {key: jnp.asarray(value) for key, value in next(helpers.run_batches()).items()}


def test_nll_and_its_gradient_ignore_tokens_of_weight_zero():
  logits = jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]])
  targets, weights = jnp.array([[2, 99]]), jnp.array([[0.5, 0.0]])
  value, gradient = jax.value_and_grad(losses.weighted_nll)(logits, targets, weights)
  np.testing.assert_allclose(value, 0.5 * 0.4076059, rtol=1e-5)
  assert np.isfinite(gradient[0, 0]).all() and (gradient[0, 1] == 0.0).all()


@pytest.mark.parametrize("target", [-1, 3])
def test_nll_of_a_target_outside_of_the_vocabulary_is_nan(target):
  nll = losses.token_nll(jnp.zeros((1, 2, 3)), jnp.array([[0, target]]))
  np.testing.assert_allclose(nll, [[np.log(3.0), np.nan]], rtol=1e-6)


def test_nll_is_float32_for_bfloat16_logits():
  assert losses.token_nll(jnp.zeros((1, 1, 3), jnp.bfloat16), jnp.array([[0]])).dtype == jnp.float32


@pytest.mark.parametrize(
  "logits, targets",
  [((2, 3), (2,)), ((1, 2, 3), (2, 1)), ((1, 2, 3), (1, 2, 1))],
)
def test_nll_rejects_shapes_that_do_not_match(logits, targets):
  with pytest.raises(AssertionError):
    losses.token_nll(jnp.zeros(logits), jnp.zeros(targets, jnp.int32))


def test_padding_has_no_weight():
  mask = jnp.array([[1, 1, 0]])
  batch = dict(targets=jnp.zeros((1, 3), jnp.int32), doc_ids=jnp.array([[0, -1, 0]]))
  np.testing.assert_array_equal(losses.loss_weights(batch), [[1.0, 0.0, 1.0]])
  weights = losses.loss_weights({**batch, "loss_mask": mask})
  np.testing.assert_array_equal(weights, [[1.0, 0.0, 0.0]])
  assert weights.dtype == jnp.float32


def test_the_reported_nats_are_a_weighted_mean(loss, batch):
  want = loss(batch)[1].loss_lm
  got = loss({**batch, "loss_mask": jnp.full((2, 32), 0.01)})[1].loss_lm
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_objective_averages_over_all_tokens(loss, batch):
  """Masked tokens count in the denominator: fewer targets make a smaller loss."""
  masked = {**batch, "loss_mask": batch["loss_mask"].at[:, 8:].set(0)}
  value, aux = loss(masked)
  want = aux.loss_lm * 8 / 32 + CONFIG.c_beta * aux.loss_commit
  np.testing.assert_allclose(value, want, rtol=1e-5)


def test_targets_of_padding_may_be_anything(loss, batch):
  padded = {**batch, "doc_ids": batch["doc_ids"].at[:, 20:].set(-1)}
  value = loss(padded)[0]
  assert np.isfinite(value)
  assert loss({**padded, "targets": padded["targets"].at[:, 20:].set(-7)})[0] == value


@pytest.mark.parametrize("target", [-1, 259])
def test_a_target_outside_of_the_vocabulary_makes_the_loss_nan(loss, batch, target):
  assert np.isnan(loss({**batch, "targets": batch["targets"].at[0, 0].set(target)})[0])


def test_the_state_gets_no_gradient(loss, batch):
  params, state = helpers.random_params(CONFIG), loss(batch)[1].state
  assert (state.attention_1.cache_counts > 0.0).any()

  def objective(means, values):
    attention = state.attention_1._replace(cache_means=means, memory_values=values)
    return tvq.training_loss(params, CONFIG, None, batch, state._replace(attention_1=attention))[0]

  gradients = jax.jit(jax.grad(objective, argnums=(0, 1)))(
    state.attention_1.cache_means, state.attention_1.memory_values
  )
  assert all((gradient == 0.0).all() for gradient in gradients)


@pytest.mark.parametrize(
  "change, error, message",
  [
    (lambda x: x[:, 1:], ValueError, r"targets must have shape \[B=2, T=32\], got \(2, 31\)"),
    (lambda x: x[0], ValueError, "targets must have shape"),
    (lambda x: x * 1.0, TypeError, "targets must be integer"),
  ],
)
def test_wrong_targets_are_named(batch, change, error, message):
  params, state = helpers.random_params(CONFIG), tvq.initial_state(CONFIG, 2)
  with pytest.raises(error, match=f"training_loss: {message}"):
    tvq.training_loss(params, CONFIG, None, {**batch, "targets": change(batch["targets"])}, state)
