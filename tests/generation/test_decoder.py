"""Decoding: one token at a time is the model, from any state and back to it, without copying it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.generation import decoder as decoder_lib
from tvq_haiku.generation import generate as generate_lib
from tvq_haiku.generation import sampling

from helpers import VARIANTS, apply, assert_trees_close, random_params, random_tokens, tiny


@functools.cache
def reader(config):
  """Reads tokens [B, T] step by step; returns logits [B, T, X] and the model's state."""

  @jax.jit
  def run(weights, tokens, state, active):
    def step(state, x):
      logits, state = decoder_lib.decode_token(config, weights, x[0], state, x[1])
      return state, logits

    state, logits = jax.lax.scan(
      step, decoder_lib.start_decoding(config, state), (tokens.T, active.T)
    )
    return logits.swapaxes(0, 1), decoder_lib.finish_decoding(state)

  def read(params, tokens, state, active=None):
    active = np.ones(tokens.shape, bool) if active is None else active
    return run(decoder_lib.prepare_weights(config, params), tokens, state, active)

  return read


def variant(name, **changes):
  # Two layers where the stack is the matter, else one: half the time to compile.
  return tiny(**{"n_layer": 2 if name == "plain" else 1, **VARIANTS[name], **changes})


@pytest.mark.parametrize(
  "name", [name for name in VARIANTS if name not in ("scan", "matmul", "assoc_scan")]
)
def test_steps_are_the_forward_pass_and_leave_its_state(name):
  config = variant(name)
  params, tokens, T = random_params(config), random_tokens(config, 2, 48), 35
  warm = apply(config, params, tokens[:, :13])
  rest = apply(config, params, tokens[:, 13:], warm.state)
  whole = np.concatenate([warm.logits, rest.logits], axis=1)
  for start, state in ((0, tvq.initial_state(config, 2)), (13, warm.state)):
    # T is no multiple of any block, and leaves every window.
    logits, state = reader(config)(params, tokens[:, start : start + T], state)
    np.testing.assert_allclose(logits, whole[:, start : start + T], atol=2e-5)
  assert_trees_close(state, rest.state)


@pytest.mark.parametrize("name", ["plain", "grouped", "full"])
def test_a_state_survives_the_way_there_and_back_bit_for_bit(name):
  config = variant(name)
  tokens = random_tokens(config, 2, 13)
  once = apply(config, random_params(config), tokens).state
  for state in (once, apply(config, random_params(config), tokens, once).state):
    back = decoder_lib.finish_decoding(decoder_lib.start_decoding(config, state))
    jax.tree.map(np.testing.assert_array_equal, back, state)
  cold = tvq.initial_state(config, 2)
  jax.tree.map(
    np.testing.assert_array_equal,
    decoder_lib.finish_decoding(decoder_lib.start_decoding(config, cold)),
    cold,
  )


@pytest.mark.parametrize("name", ["heads", "mqa", "full mha"])
def test_rows_that_stop_keep_their_state(name):
  config = variant(name)
  params, tokens = random_params(config), random_tokens(config, 3, 30)
  read = np.array([30, 11, 0])
  state = apply(config, params, random_tokens(config, 3, 9, seed=1)).state
  _, got = reader(config)(params, tokens, state, np.arange(30) < read[:, None])
  padded = np.where(np.arange(30) < read[:, None], 0, -1)
  assert_trees_close(got, apply(config, params, tokens, state, doc_ids=padded).state)


@pytest.mark.parametrize("name", ["absolute", "crossing", "full"])
def test_decoding_goes_on_with_the_last_of_packed_documents(name):
  config = variant(name)
  params, tokens = random_params(config), random_tokens(config, 2, 42)
  docs = np.repeat(np.array([[0, 1, 1], [0, 0, 2]]), [9, 9, 24], axis=1)
  state = apply(config, params, tokens[:, :21], doc_ids=docs[:, :21]).state
  rest = apply(config, params, tokens[:, 21:], state, doc_ids=docs[:, 21:])
  logits, got = reader(config)(params, tokens[:, 21:], state)
  np.testing.assert_allclose(logits, rest.logits, atol=2e-5)
  assert_trees_close(got, rest.state)


def test_training_goes_on_from_a_decoded_state():
  config = tiny(n_layer=1)
  params, tokens = random_params(config), random_tokens(config, 2, 40)

  def gradients(state):
    batch = {"inputs": tokens[:, 20:], "targets": tokens[:, 20:]}
    loss = lambda p: tvq.training_loss(config, p, jax.random.key(0), batch, state)[0]
    return jax.jit(jax.grad(loss))(params)

  block = apply(config, params, tokens[:, :20]).state
  _, decoded = reader(config)(params, tokens[:, :20], tvq.initial_state(config, 2))
  assert_trees_close(gradients(decoded), gradients(block))


@pytest.mark.parametrize("name", ["heads", "mqa", "full"])
def test_bfloat16_steps_stay_near_the_forward_pass(name):
  config = variant(name, precision="bfloat16")
  params, tokens = random_params(config), random_tokens(config, 2, 35)
  whole = apply(config, params, tokens)
  logits, state = reader(config)(params, tokens, tvq.initial_state(config, 2))
  assert logits.dtype == jnp.float32
  assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, whole.state)
  error = np.abs(logits - whole.logits).max(axis=(0, 2))
  assert np.median(error) < 0.15 * np.abs(whole.logits).max()


def test_bfloat16_counts_are_exact_past_300_tokens_of_one_code():
  config = tiny(precision="bfloat16", n_code=1, n_layer=1)
  tokens = random_tokens(config, 1, 330)
  _, state = reader(config)(random_params(config), tokens, tvq.initial_state(config, 1))
  for memory in (state.attention_1, state.attention_2):
    np.testing.assert_array_equal(
      memory.cache_counts, np.full((1, 1, 1, 1), 330.0 - config.mem_len)
    )
    assert memory.cache_means.dtype == jnp.float32


@pytest.fixture
def optimized():
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("batch", [1, 4])
def test_no_copy_of_what_a_step_remembers(optimized, batch):
  config = tiny(d_v=40, mem_len=24, n_code=27)  # sizes that nothing else has
  params = random_params(config)
  state = generate_lib.start_generation(
    config, tvq.initial_state(config, batch), jnp.zeros((batch, 11))
  )
  text = (
    generate_lib.sample_tokens.lower(
      config,
      decoder_lib.prepare_weights(config, params),
      state,
      jax.random.split(jax.random.key(0), batch),
      sampling.make_sampling_params(),
      50,
      n=50,
      eos_id=None,
    )
    .compile()
    .as_text()
  )
  assert re.search(r"\[(4,)?25,40\]", text) and re.search(r"\[(4,)?27,40\]", text)
  copies = re.findall(r"= f32\[(?:\d,)*(?:25|27),40\]\S* copy\(.*", text)
  assert not copies, copies
