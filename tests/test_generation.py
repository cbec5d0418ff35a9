"""Sampling: what is drawn, and that decoding reads as a forward pass does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku import generation

CONFIG = tvq.TransformerConfig.tiny(
    n_vocab=11, d_model=16, d_k=8, d_v=16, n_code=6, n_layer=1, block_len=8, mem_len=8)
PARAMS = helpers.random_params(CONFIG)


def generate(prompts, n=12, **kwargs):
  kwargs = {"temperature": 0.0, "rng": jax.random.key(0), **kwargs}
  return tvq.generate(PARAMS, CONFIG, prompts, max_new_tokens=n, **kwargs)


def test_tokens_logprobs_and_state_are_those_of_one_forward_pass():
  prompts = helpers.random_tokens(CONFIG, 2, 13)
  for temperature in (0.0, 1.0):
    out = generate(prompts, temperature=temperature)
    whole = np.concatenate([prompts, out.tokens], axis=1)
    forward = jax.jit(tvq.make_transformer(CONFIG).apply)(
        PARAMS, None, whole, tvq.initial_state(CONFIG, 2))
    logprobs = jax.nn.log_softmax(forward.logits[:, 12:-1])
    if temperature == 0.0:
      np.testing.assert_array_equal(out.tokens, logprobs.argmax(-1))
    drawn = jnp.take_along_axis(logprobs, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logprobs, drawn, atol=2e-5)
    helpers.assert_trees_close(out.state, forward.state)


def test_ragged_prompts_and_warm_states_give_what_rows_give_alone():
  text = helpers.random_tokens(CONFIG, 2, 20)
  warm = generate(text, n=3).state
  prompts, lengths = helpers.random_tokens(CONFIG, 2, 9, seed=5), [9, 4]
  both = generate(prompts, lengths=lengths, state=warm)
  for row in range(2):
    state = generate(text[row : row + 1], n=3).state
    alone = generate(prompts[row : row + 1, : lengths[row]], state=state)
    np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])
    np.testing.assert_allclose(both.logprobs[row], alone.logprobs[0], atol=2e-5)


def test_rows_end_at_eos():
  prompts = helpers.random_tokens(CONFIG, 4, 5)
  free = generate(prompts, n=20, temperature=1.0)
  eos = int(free.tokens[0, 3])
  out = generate(prompts, n=20, temperature=1.0, eos_id=eos)
  for row, length in enumerate(out.lengths):
    stop = np.flatnonzero(free.tokens[row] == eos)
    assert length == (stop[0] + 1 if stop.size else 20)
    np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])
    assert not out.tokens[row, length:].any() and not out.logprobs[row, length:].any()
  np.testing.assert_array_equal(out.state.attention_1.position[0], 5 + out.lengths)


def test_same_seed_same_text():
  prompts = np.repeat(helpers.random_tokens(CONFIG, 1, 5), 3, axis=0)
  first, again = (generate(prompts, temperature=1.0).tokens for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert (first[0] != first[1]).any()
  assert (generate(prompts, temperature=1.0, rng=jax.random.key(1)).tokens != first).any()
  np.testing.assert_array_equal(generate(prompts[:1], temperature=1.0).tokens, first[:1])


@pytest.mark.parametrize("settings, allowed", [
    (dict(), {0, 1, 2, 3, 4}),
    (dict(top_p=0.5), {0, 1}), (dict(top_p=0.4), {0}), (dict(top_p=0.01), {0}),
    (dict(top_p=0.71), {0, 1, 2}), (dict(top_k=2), {0, 1}), (dict(top_k=99), {0, 1, 2, 3, 4}),
    (dict(min_p=0.4), {0, 1, 2}), (dict(top_p=0.9, top_k=2, min_p=0.9), {0}),
    (dict(temperature=0.0), {0})])
def test_sampling_draws_from_the_allowed_set_in_proportion(settings, allowed):
  probabilities = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
  place = np.array([3, 0, 4, 1, 2])  # likeliest first: token place[i] has probabilities[i]
  logits = np.zeros(5)
  logits[place] = np.log(probabilities)
  draws = jax.vmap(lambda key: generation.sample_token(key, jnp.asarray(logits), **settings))(
      jax.random.split(jax.random.key(0), 4000))
  counts = np.bincount(draws, minlength=5)[place]
  kept = np.where([i in allowed for i in range(5)], probabilities, 0.0)
  np.testing.assert_allclose(counts / 4000, kept / kept.sum(), atol=0.03)
  assert set(np.flatnonzero(counts)) <= allowed


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=-1.0), "temperature=-1.0 must not be negative"),
    (dict(top_p=0.0), r"top_p=0.0 must lie in \(0, 1\]"), (dict(top_p=1.1), "top_p=1.1"),
    (dict(top_k=0), "top_k=0 must be an integer, at least 1"), (dict(min_p=2.0), "min_p=2.0"),
    (dict(top_k=1.5), "top_k=1.5"), (dict(eos_id=11), r"eos_id=11 must lie in \[0, 11\)"),
    (dict(state=tvq.initial_state(CONFIG, 3)), "batch of 2"),
    (dict(n=2.5), "max_new_tokens=2.5"), (dict(n=0), "max_new_tokens=0"),
    (dict(lengths=[1, 6]), r"lengths=\[1, 6\] must be one of 1...5"),
    (dict(lengths=[0, 5]), r"lengths=\[0, 5\]"), (dict(lengths=[5]), r"lengths=\[5\]")])
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    generate(helpers.random_tokens(CONFIG, 2, 5), **settings)


def test_an_encoder_neither_writes_nor_predicts():
  config = CONFIG.replace(causal=False)
  params = helpers.random_params(config)
  with pytest.raises(ValueError, match="causal=False: an encoder does not continue"):
    tvq.generate(params, config, np.zeros((1, 3), np.int32), max_new_tokens=1, rng=jax.random.key(0))
  with pytest.raises(ValueError, match="causal=False: an encoder sees"):
    tvq.evaluate(config, params, data.stream_of([np.arange(9)]))


def test_prompts_out_of_range():
  with pytest.raises(ValueError, match=r"\[0, 11\), got 11...11"):
    generate(np.full((1, 3), 11))


def test_text_needs_the_byte_vocabulary():
  with pytest.raises(ValueError, match="n_vocab=11, not the 259"):
    tvq.continue_text(PARAMS, CONFIG, ["a"], max_new_tokens=1, rng=jax.random.key(0))
  config = tvq.TransformerConfig.tiny()
  for prompts in ("text", []):
    with pytest.raises(ValueError, match="must be a list of at least one text"):
      tvq.continue_text(PARAMS, config, prompts, max_new_tokens=1, rng=jax.random.key(0))


def test_text_continues_each_prompt():
  config = tvq.TransformerConfig.tiny(n_layer=1)
  params = helpers.random_params(config)
  prompts = ["", "Anne", "Captain Wentworth"]
  write = lambda prompts: tvq.continue_text(
      params, config, prompts, max_new_tokens=20, rng=jax.random.key(0), temperature=0.0)
  assert write(prompts) == [write([prompt])[0] for prompt in prompts]
