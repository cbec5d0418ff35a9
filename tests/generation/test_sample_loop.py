"""Tests of the sampling loop: when it ends, and that the program copies no large array."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.generation import decoder_weights, sample_loop, sampling
from tvq_haiku.generation.stopping import make_stop_conditions

from helpers import assert_same, random_params, tiny

CONFIG = tiny()
PARAMS = random_params(CONFIG)
RNGS = jax.random.split(jax.random.key(0), 2)
NO_STOP = make_stop_conditions()


def start(stop, config=CONFIG, batch_size=2):
  state = tvq.initial_state(config, batch_size)
  return sample_loop.start_generation(config, state, jnp.zeros((batch_size, 11)), stop)


def sample(state, limit, stop, chunk_len=8):
  return sample_loop.sample_tokens(
    decoder_weights.prepare_weights(PARAMS, CONFIG),
    CONFIG,
    state,
    RNGS,
    sampling.make_sampling_params(),
    limit,
    chunk_len=chunk_len,
    stop=stop,
  )


def test_samples_up_to_the_limit_and_pads_with_zeros():
  sampled, state = sample(start(NO_STOP), 5, NO_STOP)
  full, _ = sample(start(NO_STOP), 8, NO_STOP)
  assert sampled.tokens.shape == (2, 8) and sampled.lengths.tolist() == [5, 5]
  np.testing.assert_array_equal(sampled.tokens[:, :5], full.tokens[:, :5])
  assert not sampled.tokens[:, 5:].any() and not sampled.logprobs[:, 5:].any()
  assert (sampled.logprobs[:, :5] < 0.0).all()
  assert state.decode_state.n_read.tolist() == [5, 5] and not state.ended.any()


def test_a_text_that_has_ended_keeps_its_state():
  unstopped, _ = sample(start(NO_STOP), 8, NO_STOP)
  first, second = np.asarray(unstopped.tokens)
  eos = int(next(token for token in first if token not in second))
  length = first.tolist().index(eos) + 1
  stop = make_stop_conditions([[eos]])
  sampled, state = sample(start(stop), 8, stop)
  assert sampled.lengths.tolist() == [length, 8] and state.ended.tolist() == [True, False]
  assert sampled.tokens[0].tolist() == [*first[:length].tolist(), *[0] * (8 - length)]
  np.testing.assert_array_equal(sampled.tokens[1], second)
  _, at_end = sample(start(stop), length, stop)
  assert_same(state.logits[0], at_end.logits[0])
  assert state.decode_state.n_read.tolist() == [length, 8]


def test_a_stop_sequence_may_span_two_calls():
  unstopped, _ = sample(start(NO_STOP), 8, NO_STOP)
  sequence = np.asarray(unstopped.tokens)[0, 3:6].tolist()
  stop = make_stop_conditions([sequence])
  _, state = sample(start(stop), 4, stop)
  assert not state.ended[0]
  sampled, state = sample(state, 4, stop)
  assert state.ended[0] and sampled.lengths[0] == 2


@pytest.mark.parametrize("ends", [False, True])
def test_several_chunks_are_the_same_as_one(monkeypatch, ends):
  unstopped, _ = sample(start(NO_STOP), 8, NO_STOP)
  stop = make_stop_conditions([[int(unstopped.tokens[0, 2])]] if ends else [])

  def sample_in_chunks():
    return sample_loop.sample_in_chunks(
      decoder_weights.prepare_weights(PARAMS, CONFIG),
      CONFIG,
      start(stop),
      RNGS,
      sampling.make_sampling_params(),
      max_new_tokens=13,
      stop=stop,
      show_progress=False,
    )

  one = sample_in_chunks()
  monkeypatch.setattr(sample_loop, "_MAX_CHUNK_LEN", 4)
  sampled, state = sample_in_chunks()
  assert_same((sampled, state), one)
  assert sampled.tokens.shape == sampled.logprobs.shape == (2, 13)
  assert_same(sampled.lengths, state.decode_state.n_read)
  assert sampled.lengths[0] <= 3 if ends else sampled.lengths.tolist() == [13, 13]


def test_other_stop_conditions_and_filters_do_not_recompile():
  counts = []
  for stop, top_k in (([], 3), ([[1]], 5), ([[1], [2, 3]], 200), ([[4] * 8], 2)):
    conditions = make_stop_conditions(stop)
    sample_loop.sample_tokens(
      decoder_weights.prepare_weights(PARAMS, CONFIG),
      CONFIG,
      start(conditions),
      RNGS,
      sampling.make_sampling_params(top_k=top_k, temperature=0.1 + top_k),
      4,
      chunk_len=8,
      stop=conditions,
    )
    counts.append(
      (sample_loop.sample_tokens._cache_size(), sample_loop.start_generation._cache_size())
    )
  assert len(set(counts)) == 1


@pytest.fixture
def with_optimizations():
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_compiled_loop_copies_no_ring_buffer_or_cache(with_optimizations, batch_size):
  # No other axis has the same size as W = 25, S = 27 or V = 40.
  config = tiny(d_v=40, mem_len=24, n_code=27)
  program = sample_loop.sample_tokens.lower(
    decoder_weights.prepare_weights(random_params(config), config),
    config,
    start(NO_STOP, config, batch_size),
    jax.random.split(jax.random.key(0), batch_size),
    sampling.make_sampling_params(),
    50,
    chunk_len=50,
    stop=NO_STOP,
  ).compile()
  text = program.as_text()
  assert re.search(r"\[(4,)?25,40\]", text) and re.search(r"\[(4,)?27,40\]", text)
  copies = re.findall(r"= f32\[(?:\d,)*(?:25|27),40\]\S* copy\(.*", text)
  assert not copies, copies
