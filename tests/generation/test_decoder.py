"""Tests of decoding: token by token, the model computes the same as in one forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.generation import decoder, decoder_weights

from helpers import (
  VARIANTS,
  apply,
  assert_same,
  assert_trees_close,
  random_params,
  random_tokens,
  tiny,
)

pytestmark = pytest.mark.slow


@functools.cache
def make_reader(config):
  """Returns a function that reads tokens [B, T] one by one.

  It returns logits [B, T, X] and the state of the model after the last token.
  """

  @jax.jit
  def scan(weights, tokens, state, active):
    def step(state, x):
      logits, state = decoder.decode_token(weights, config, x[0], state, x[1])
      return state, logits

    start = decoder.start_decoding(config, state)
    state, logits = jax.lax.scan(step, start, (tokens.T, active.T))
    return logits.swapaxes(0, 1), decoder.finish_decoding(state)

  def read(params, tokens, state, active=None):
    active = np.ones(tokens.shape, bool) if active is None else active
    return scan(decoder_weights.prepare_weights(params, config), tokens, state, active)

  return read


def variant(name, **changes):
  # Most variants have one layer, because a second one doubles the compilation time.
  return tiny(**{"n_layer": 2 if name == "plain" else 1, **VARIANTS[name], **changes})


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "assoc_scan"])
def test_logits_and_state_equal_those_of_the_forward_pass(name):
  config = variant(name)
  params, tokens, T = random_params(config), random_tokens(config, 2, 48), 35
  warm = apply(params, config, tokens[:, :13])
  rest = apply(params, config, tokens[:, 13:], warm.state)
  expected = np.concatenate([warm.logits, rest.logits], axis=1)
  for start, state in ((0, tvq.initial_state(config, 2)), (13, warm.state)):
    # T is not a multiple of any block length, and longer than every window.
    logits, state = make_reader(config)(params, tokens[:, start : start + T], state)
    np.testing.assert_allclose(logits, expected[:, start : start + T], atol=2e-5)
  assert_trees_close(state, rest.state)


@pytest.mark.parametrize("name", ["plain", "grouped", "full"])
def test_a_state_is_unchanged_by_starting_and_finishing_decoding(name):
  config = variant(name)
  tokens = random_tokens(config, 2, 13)
  once = apply(random_params(config), config, tokens).state
  twice = apply(random_params(config), config, tokens, once).state
  for state in (tvq.initial_state(config, 2), once, twice):
    assert_same(decoder.finish_decoding(decoder.start_decoding(config, state)), state)


@pytest.mark.parametrize("name", ["heads", "mqa", "full mha"])
def test_inactive_batch_elements_keep_their_state(name):
  config = variant(name)
  params, tokens = random_params(config), random_tokens(config, 3, 30)
  n_read = np.array([30, 11, 0])
  active = np.arange(30) < n_read[:, None]
  state = apply(params, config, random_tokens(config, 3, 9, seed=1)).state
  _, got = make_reader(config)(params, tokens, state, active)
  padded = np.where(active, 0, -1)
  assert_trees_close(got, apply(params, config, tokens, state, doc_ids=padded).state)


@pytest.mark.parametrize("name", ["absolute", "crossing", "full"])
def test_decoding_continues_the_last_of_several_packed_documents(name):
  config = variant(name)
  params, tokens = random_params(config), random_tokens(config, 2, 42)
  docs = np.repeat(np.array([[0, 1, 1], [0, 0, 2]]), [9, 9, 24], axis=1)
  state = apply(params, config, tokens[:, :21], doc_ids=docs[:, :21]).state
  rest = apply(params, config, tokens[:, 21:], state, doc_ids=docs[:, 21:])
  logits, got = make_reader(config)(params, tokens[:, 21:], state)
  np.testing.assert_allclose(logits, rest.logits, atol=2e-5)
  assert_trees_close(got, rest.state)


def test_training_continues_from_a_decoded_state():
  config = tiny(n_layer=1)
  params, tokens = random_params(config), random_tokens(config, 2, 40)

  def gradients(state):
    batch = {"inputs": tokens[:, 20:], "targets": tokens[:, 20:]}
    loss = lambda p: tvq.training_loss(p, config, jax.random.key(0), batch, state)[0]
    return jax.jit(jax.grad(loss))(params)

  forward = apply(params, config, tokens[:, :20]).state
  _, decoded = make_reader(config)(params, tokens[:, :20], tvq.initial_state(config, 2))
  assert_trees_close(gradients(decoded), gradients(forward))


@pytest.mark.parametrize("name", ["heads", "mqa", "full"])
def test_bfloat16_logits_are_close_to_those_of_the_forward_pass(name):
  config = variant(name, precision="bfloat16")
  params, tokens = random_params(config), random_tokens(config, 2, 35)
  forward = apply(params, config, tokens)
  logits, state = make_reader(config)(params, tokens, tvq.initial_state(config, 2))
  assert logits.dtype == jnp.float32
  assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, forward.state)
  # The median is compared, because rounding changes the codes of some keys.
  error = np.abs(logits - forward.logits).max(axis=(0, 2))
  assert np.median(error) < 0.15 * np.abs(forward.logits).max()


def test_bfloat16_counts_are_exact_past_300_tokens_of_one_code():
  config = tiny(precision="bfloat16", n_code=1, n_layer=1)
  tokens = random_tokens(config, 1, 330)
  _, state = make_reader(config)(random_params(config), tokens, tvq.initial_state(config, 1))
  for memory in (state.attention_1, state.attention_2):
    np.testing.assert_array_equal(
      memory.cache_counts, np.full((1, 1, 1, 1), 330.0 - config.mem_len)
    )
    assert memory.cache_means.dtype == jnp.float32
