"""Sampling: what is drawn, and that decoding reads as a forward pass does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.generation import generate as generate_lib

import helpers

CONFIG = tvq.TransformerConfig.tiny(
  n_vocab=11, d_model=16, d_k=8, d_v=16, n_code=6, n_layer=1, block_len=8, mem_len=8
)
PARAMS = helpers.random_params(CONFIG)


def generate(prompts, n=12, **kwargs):
  kwargs = {"temperature": 0.0, "rng": jax.random.key(0), **kwargs}
  return tvq.generate(PARAMS, CONFIG, prompts, max_new_tokens=n, **kwargs)


def test_tokens_logprobs_and_state_are_those_of_one_forward_pass():
  prompts = helpers.random_tokens(CONFIG, 2, 13)
  for temperature in (0.0, 1.0):
    out = generate(prompts, temperature=temperature)
    whole = np.concatenate([prompts, out.tokens], axis=1)
    forward = helpers.apply(CONFIG, PARAMS, whole)
    logprobs = jax.nn.log_softmax(forward.logits[:, 12:-1])
    if temperature == 0.0:
      np.testing.assert_array_equal(out.tokens, logprobs.argmax(-1))
    drawn = jnp.take_along_axis(logprobs, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logprobs, drawn, atol=2e-5)
    helpers.assert_trees_close(out.state, forward.state)


def test_ragged_prompts_and_warm_states_give_what_rows_give_alone():
  text = helpers.random_tokens(CONFIG, 2, 20)
  warm = generate(text).state
  prompts, lengths = helpers.random_tokens(CONFIG, 2, 9, seed=5), [9, 4]
  both = generate(prompts, lengths=lengths, state=warm)
  for row in range(2):
    state = generate(text[row : row + 1]).state
    alone = generate(prompts[row : row + 1, : lengths[row]], state=state)
    np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])
    np.testing.assert_allclose(both.logprobs[row], alone.logprobs[0], atol=2e-5)


def test_rows_end_at_eos():
  prompts = helpers.random_tokens(CONFIG, 4, 5)
  free = generate(prompts, n=16, temperature=1.0)
  eos = int(free.tokens[0, 3])
  out = generate(prompts, n=16, temperature=1.0, eos_id=eos)
  for row, length in enumerate(out.lengths):
    stop = np.flatnonzero(free.tokens[row] == eos)
    assert length == (stop[0] + 1 if stop.size else 16)
    np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])
    assert not out.tokens[row, length:].any() and not out.logprobs[row, length:].any()
  np.testing.assert_array_equal(out.state.attention_1.position[0], 5 + out.lengths)


def test_same_seed_same_text_whatever_the_batch():
  prompts = helpers.random_tokens(CONFIG, 4, 5)
  prompts[3] = prompts[0]
  first, again = (generate(prompts, temperature=1.0).tokens for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert (first[0] != first[3]).any()  # equal prompts go on differently
  assert (generate(prompts, temperature=1.0, rng=jax.random.key(1)).tokens != first).any()
  for row in range(3):
    alone = generate(prompts[row : row + 1], temperature=1.0).tokens[0]
    np.testing.assert_array_equal(alone, first[row])


def test_in_two_parts_as_in_one():
  prompts, keys = helpers.random_tokens(CONFIG, 2, 5), jax.random.split(jax.random.key(3), 2)
  whole = generate(prompts, n=12, temperature=1.0, rng=keys)
  first = generate(prompts, n=5, temperature=1.0, rng=keys)
  empty = np.zeros((2, 0), np.int32)
  then = generate(empty, n=7, temperature=1.0, rng=keys, state=first.state, logits=first.logits)
  np.testing.assert_array_equal(np.concatenate([first.tokens, then.tokens], axis=1), whole.tokens)
  helpers.assert_trees_close(then.state, whole.state)
  with pytest.raises(ValueError, match="prompt 0 is empty: give the logits"):
    generate(empty, state=first.state)


def test_long_texts_are_drawn_in_parts(monkeypatch):
  prompts = helpers.random_tokens(CONFIG, 3, 5)
  eos = int(generate(prompts, temperature=1.0).tokens[0, 2])
  whole = generate(prompts, n=12, temperature=1.0, eos_id=eos)
  monkeypatch.setattr(generate_lib, "_LONGEST_LOOP", 4)
  parts = generate(prompts, n=12, temperature=1.0, eos_id=eos)
  for name in ("tokens", "lengths"):
    np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
  helpers.assert_trees_close(parts._replace(tokens=0), whole._replace(tokens=0))
  short = generate(prompts[:1], n=12, temperature=1.0, eos_id=eos)  # ends in the first part
  np.testing.assert_array_equal(short.tokens, whole.tokens[:1])


def test_an_empty_prompt_begins_with_the_eos():
  prompts = helpers.random_tokens(CONFIG, 2, 5)
  got = generate(prompts, lengths=[5, 0], eos_id=1)
  want = generate(np.array([[1]]), eos_id=1)
  np.testing.assert_array_equal(got.tokens[1], want.tokens[0])
  np.testing.assert_array_equal(generate(np.zeros((1, 0), np.int32), eos_id=1).tokens, want.tokens)


def test_rows_end_at_stop_sequences():
  prompts = helpers.random_tokens(CONFIG, 3, 5)
  free = np.asarray(generate(prompts, n=16, temperature=1.0).tokens)
  stops = [free[0, 4:7].tolist(), free[1, 9:10].tolist()]
  out = generate(prompts, n=16, temperature=1.0, stop=stops)
  for row in range(3):
    ends = [
      i for i in range(1, 17) for s in stops if free[row, max(i - len(s), 0) : i].tolist() == s
    ]
    assert out.lengths[row] == (min(ends) if ends else 16)
    np.testing.assert_array_equal(
      out.tokens[row, : out.lengths[row]], free[row, : out.lengths[row]]
    )
  assert out.lengths[0] <= 7 and out.lengths[1] <= 10


def test_a_stop_sequence_is_not_found_in_the_prompt():
  prompts = helpers.random_tokens(CONFIG, 1, 5)
  free = generate(prompts, n=4).tokens[0]
  both = [int(prompts[0, -1]), int(free[0])]
  out = generate(prompts, n=1, stop=[both])
  assert not jnp.any(out.state.document < 0) and out.lengths[0] == 1
  out = generate(prompts, n=4, stop=[both])
  assert out.lengths[0] == 4 or free.tolist()[: int(out.lengths[0])][-2:] == both


def test_prompts_longer_than_a_window_are_read_in_parts(monkeypatch):
  monkeypatch.setattr(generate_lib, "_LONGEST_WINDOW", 16)
  prompts, lengths = helpers.random_tokens(CONFIG, 2, 50), [50, 20]
  out = generate(prompts, lengths=lengths, n=3)
  for row, length in enumerate(lengths):
    forward = helpers.apply(CONFIG, PARAMS, prompts[row : row + 1, :length])
    want = jax.nn.log_softmax(forward.logits[0, -1])
    assert out.tokens[row, 0] == want.argmax()
    np.testing.assert_allclose(out.logprobs[row, 0], want.max(), atol=2e-5)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(top_p=1.1), r"generate: top_p=1.1 must lie in \(0, 1\]"),
    (dict(stop=[[]]), "a stop sequence must have at least one token"),
    (dict(logits=np.zeros((2, 10))), r"logits must have shape \[B=2, X=11\], got \(2, 10\)"),
    (dict(eos_id=11), r"eos_id=11 must lie in \[0, 11\)"),
    (dict(state=tvq.initial_state(CONFIG, 3)), "batch of 2"),
    (dict(n=2.5), "max_new_tokens=2.5"),
    (dict(n=0), "max_new_tokens=0"),
    (dict(lengths=[1, 6]), r"lengths=\[1, 6\] must be one of 0...5"),
    (dict(lengths=[0, 5]), "prompt 0 is empty: it needs an eos_id"),
    (dict(lengths=[5]), r"lengths=\[5\]"),
  ],
)
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    generate(helpers.random_tokens(CONFIG, 2, 5), **settings)


def test_an_encoder_neither_writes_nor_predicts():
  config = CONFIG.replace(causal=False)
  params = helpers.random_params(config)
  with pytest.raises(ValueError, match="causal=False: an encoder does not continue"):
    tvq.generate(
      params, config, np.zeros((1, 3), np.int32), max_new_tokens=1, rng=jax.random.key(0)
    )
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
    params, config, prompts, max_new_tokens=20, rng=jax.random.key(0), temperature=0.0
  )
  assert write(prompts) == [write([prompt])[0] for prompt in prompts]


def test_text_ends_before_a_stop_text():
  config = tvq.TransformerConfig.tiny(n_layer=1)
  params = helpers.random_params(config)
  write = lambda **kwargs: tvq.continue_text(
    params, config, ["Anne"], max_new_tokens=40, rng=jax.random.key(0), **kwargs
  )[0]
  raw = data.ByteVocabulary.encode("Anne")
  out = tvq.generate(
    params, config, np.append(1, raw)[None], max_new_tokens=40, rng=jax.random.key(0)
  )
  tokens = np.asarray(out.tokens)[0]
  place = next(i for i in range(5, 40) if (tokens[i : i + 2] >= 3).all() and 1 not in tokens[:i])
  stop = data.ByteVocabulary.decode(tokens[place : place + 2])
  first = data.ByteVocabulary.decode(tokens).find(stop)
  assert write(stop=[stop]) == data.ByteVocabulary.decode(tokens)[:first].decode(errors="replace")
