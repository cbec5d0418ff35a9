"""The public decoding step equals the model for T = 1, for states and weights of both kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq

from helpers import VARIANTS, apply, assert_trees_close, random_params, random_tokens, tiny

pytestmark = pytest.mark.slow

CONFIG = tiny(pe_abs=True)


@pytest.mark.parametrize("name", ["heads", "hybrid"])
def test_steps_equal_one_call_for_states_and_weights_of_both_kinds(name):
  config = tiny(**VARIANTS[name])
  params, tokens = random_params(config), random_tokens(config, 2, 14)
  warm = apply(params, config, tokens[:, :9]).state
  want = apply(params, config, tokens[:, 9:], warm)
  weights = tvq.prepare_weights(params, config)
  for given, state in (
    (params, warm),
    (weights, warm),
    (params, tvq.start_decoding(config, warm)),
    (weights, tvq.start_decoding(config, warm)),
  ):
    kind, logits = type(state), []
    for token in tokens[:, 9:].T:
      step_logits, state = tvq.decode_step(given, config, token, state)
      logits.append(step_logits)
    assert type(state) is kind
    np.testing.assert_allclose(np.stack(logits, axis=1), want.logits, atol=2e-5)
    is_started = isinstance(state, tvq.DecodeState)
    assert_trees_close(tvq.finish_decoding(state) if is_started else state, want.state)


def test_a_loop_of_steps_can_be_compiled():
  params, tokens = random_params(CONFIG), random_tokens(CONFIG, 2, 12)

  @jax.jit
  def read(params, tokens):
    weights = tvq.prepare_weights(params, CONFIG)

    def step(state, token):
      logits, state = tvq.decode_step(weights, CONFIG, token, state)
      return state, logits

    start = tvq.start_decoding(CONFIG, tvq.initial_state(CONFIG, 2))
    return jax.lax.scan(step, start, tokens.T)[1].swapaxes(0, 1)

  np.testing.assert_allclose(read(params, tokens), apply(params, CONFIG, tokens).logits, atol=2e-5)


def test_a_traced_token_that_is_out_of_range_has_nan_logits():
  state = tvq.initial_state(CONFIG, 2)
  step = jax.jit(lambda token: tvq.decode_step(random_params(CONFIG), CONFIG, token, state)[0])
  assert jnp.isnan(step(jnp.array([11, -1]))).all()


@pytest.mark.parametrize(
  "inputs, error, message",
  [
    (np.array([3, 11]), ValueError, r"tokens must lie in \[0, 11\), got 3...11"),
    (np.array([0.5, 1.0]), TypeError, "tokens must be integers, got float"),
    (np.zeros((2, 1), np.int32), ValueError, r"inputs must have shape \[B\], got \(2, 1\)"),
    (np.zeros(3, np.int32), ValueError, "for this config and a batch of 3"),
    ([1, 2], TypeError, "inputs must be an array, got list"),
  ],
)
def test_wrong_tokens_are_named(inputs, error, message):
  with pytest.raises(error, match=message):
    tvq.decode_step(random_params(CONFIG), CONFIG, inputs, tvq.initial_state(CONFIG, 2))


def test_wrong_features_are_named():
  config = CONFIG.replace(no_emb=True)
  for inputs in (np.zeros((2, 8), np.float32), np.zeros(2, np.int32)):
    with pytest.raises(ValueError, match=r"inputs must have shape \[B, D=16\]"):
      tvq.decode_step(random_params(config), config, inputs, tvq.initial_state(config, 2))


def test_parameters_weights_and_states_of_another_config_are_refused():
  params, state, token = random_params(CONFIG), tvq.initial_state(CONFIG, 2), np.array([1, 2])
  other = tiny(d_v=8, pe_abs=True)
  weights, started = tvq.prepare_weights(params, CONFIG), tvq.start_decoding(CONFIG, state)
  for given, message in (
    ((params, other, token, tvq.initial_state(other, 2)), "params do not fit this config"),
    ((weights, other, token, tvq.initial_state(other, 2)), "prepared with another config"),
    ((params, CONFIG, token, tvq.initial_state(other, 2)), r"state.attention_1.memory_values must"),
    ((random_params(other), other, token, started), r"state.attention_1.memory_values must"),
    ((params, CONFIG, token, None), "state must come from tvq_haiku.initial_state"),
  ):
    with pytest.raises(ValueError, match=message):
      tvq.decode_step(*given)
  encoder = CONFIG.replace(causal=False)
  with pytest.raises(ValueError, match="decode_step: causal=False"):
    tvq.decode_step(params, encoder, token, tvq.initial_state(encoder, 2))
