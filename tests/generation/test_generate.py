"""Tests of `generate` and `continue_text`, whose results must agree with forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.generation import sample_loop

import helpers

pytestmark = pytest.mark.slow

CONFIG = helpers.tiny()
PARAMS = helpers.random_params(CONFIG)
TEXT_CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
TEXT_PARAMS = helpers.random_params(TEXT_CONFIG)


def generate(prompts, n=12, **kwargs):
  kwargs = {"temperature": 0.0, "rng": jax.random.key(0), **kwargs}
  return tvq.generate(PARAMS, CONFIG, prompts, max_new_tokens=n, **kwargs)


def continue_text(prompts, n=20, **kwargs):
  settings = {"rng": jax.random.key(0), "max_new_tokens": n, **kwargs}
  return tvq.continue_text(TEXT_PARAMS, TEXT_CONFIG, prompts, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_and_state_equal_those_of_one_forward_pass(temperature):
  prompts = helpers.random_tokens(CONFIG, 2, 13)
  out = generate(prompts, temperature=temperature)
  forward = helpers.apply(PARAMS, CONFIG, np.concatenate([prompts, out.tokens], axis=1))
  logprobs = jax.nn.log_softmax(forward.logits[:, 12:-1])
  if temperature == 0.0:
    np.testing.assert_array_equal(out.tokens, logprobs.argmax(-1))
  expected = jnp.take_along_axis(logprobs, out.tokens[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(out.logprobs, expected, atol=2e-5)
  np.testing.assert_allclose(out.logits, forward.logits[:, -1], atol=2e-5)
  helpers.assert_trees_close(out.state, forward.state)


def test_ragged_prompts_after_a_state_give_the_same_as_each_prompt_alone():
  text = helpers.random_tokens(CONFIG, 2, 20)
  state = generate(text).state
  prompts, lengths = helpers.random_tokens(CONFIG, 2, 9, seed=5), [9, 4]
  batch = generate(prompts, lengths=lengths, state=state)
  for b in range(2):
    own_state = generate(text[b : b + 1]).state
    alone = generate(prompts[b : b + 1, : lengths[b]], state=own_state)
    np.testing.assert_array_equal(batch.tokens[b], alone.tokens[0])
    np.testing.assert_allclose(batch.logprobs[b], alone.logprobs[0], atol=2e-5)


def test_texts_end_at_an_eos():
  prompts = helpers.random_tokens(CONFIG, 4, 5)
  unstopped = generate(prompts, n=16, temperature=1.0)
  eos = int(unstopped.tokens[0, 3])
  out = generate(prompts, n=16, temperature=1.0, eos_id=eos)
  for b, length in enumerate(out.lengths):
    positions = np.flatnonzero(unstopped.tokens[b] == eos)
    assert length == (positions[0] + 1 if positions.size else 16)
    np.testing.assert_array_equal(out.tokens[b, :length], unstopped.tokens[b, :length])
    assert not out.tokens[b, length:].any() and not out.logprobs[b, length:].any()
  assert out.lengths[0] <= 4
  np.testing.assert_array_equal(out.state.attention_1.position[0], 5 + out.lengths)


def test_texts_end_at_any_of_several_eos_tokens():
  prompts = helpers.random_tokens(CONFIG, 3, 5)
  unstopped = generate(prompts, n=16, temperature=1.0).tokens.tolist()
  eos_ids = [unstopped[0][3], unstopped[1][5]]
  out = generate(prompts, n=16, temperature=1.0, eos_id=eos_ids)
  expected = [length_until(tokens, [[token] for token in eos_ids]) for tokens in unstopped]
  assert out.lengths.tolist() == expected and expected[0] <= 4 and expected[1] <= 6
  empty = generate(np.zeros((1, 0), np.int32), eos_id=eos_ids)
  from_first = generate(np.array([eos_ids[:1]]), eos_id=eos_ids)
  np.testing.assert_array_equal(empty.tokens, from_first.tokens)


def test_generation_is_refused_inside_of_transformations():
  prompts = helpers.random_tokens(CONFIG, 1, 5)
  message = "^generate is not for use inside jax.jit or another .* tvq.decode_step"
  for function in (
    lambda params: tvq.generate(params, CONFIG, prompts, max_new_tokens=2, rng=jax.random.key(0)),
    lambda _: generate(prompts, n=2),  # nothing that is passed to it is traced
    lambda _: generate(jnp.asarray(prompts) + 1, n=2),
  ):
    with pytest.raises(TypeError, match=message):
      jax.jit(function)(PARAMS)
  with pytest.raises(TypeError, match=message):
    jax.vmap(lambda rng: generate(prompts, rng=rng))(jax.random.split(jax.random.key(0), 2))


def test_the_same_key_gives_the_same_text_in_any_batch():
  prompts = helpers.random_tokens(CONFIG, 4, 5)
  prompts[3] = prompts[0]
  first, again = (generate(prompts, temperature=1.0).tokens for _ in range(2))
  np.testing.assert_array_equal(first, again)
  assert (first[0] != first[3]).any()  # equal prompts continue differently
  assert (generate(prompts, temperature=1.0, rng=jax.random.key(1)).tokens != first).any()
  for b in range(3):
    alone = generate(prompts[b : b + 1], temperature=1.0).tokens[0]
    np.testing.assert_array_equal(alone, first[b])


def test_a_second_call_continues_the_first():
  prompts, rngs = helpers.random_tokens(CONFIG, 2, 5), jax.random.split(jax.random.key(3), 2)
  one = generate(prompts, n=12, temperature=1.0, rng=rngs)
  first = generate(prompts, n=5, temperature=1.0, rng=rngs)
  empty = np.zeros((2, 0), np.int32)
  resume = dict(state=first.state, logits=first.logits)
  second = generate(empty, n=7, temperature=1.0, rng=rngs, **resume)
  np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens], axis=1), one.tokens)
  helpers.assert_trees_close(second.state, one.state)
  with pytest.raises(ValueError, match=r"prompts\[0\] is empty, .* pass the `logits`"):
    generate(empty, state=first.state)


def test_the_result_does_not_depend_on_the_chunk_length(monkeypatch):
  prompts = helpers.random_tokens(CONFIG, 3, 5)
  eos = int(generate(prompts, temperature=1.0).tokens[0, 2])
  one_chunk = generate(prompts, n=12, temperature=1.0, eos_id=eos)
  monkeypatch.setattr(sample_loop, "_MAX_CHUNK_LEN", 4)
  chunks = generate(prompts, n=12, temperature=1.0, eos_id=eos)
  for name in ("tokens", "lengths"):
    np.testing.assert_array_equal(getattr(chunks, name), getattr(one_chunk, name))
  helpers.assert_trees_close(chunks._replace(tokens=0), one_chunk._replace(tokens=0))
  short = generate(prompts[:1], n=12, temperature=1.0, eos_id=eos)
  assert short.lengths[0] <= 3  # ends in the first of three chunks
  np.testing.assert_array_equal(short.tokens, one_chunk.tokens[:1])


def test_an_empty_prompt_starts_with_the_eos():
  prompts = helpers.random_tokens(CONFIG, 2, 5)
  from_eos = generate(np.array([[1]]), eos_id=1)
  ragged = generate(prompts, lengths=[5, 0], eos_id=1)
  np.testing.assert_array_equal(ragged.tokens[1], from_eos.tokens[0])
  empty = generate(np.zeros((1, 0), np.int32), eos_id=1)
  np.testing.assert_array_equal(empty.tokens, from_eos.tokens)


def test_texts_end_at_a_stop_sequence():
  prompts = helpers.random_tokens(CONFIG, 3, 5)
  unstopped = np.asarray(generate(prompts, n=16, temperature=1.0).tokens)
  stop = [unstopped[0, 4:7].tolist(), unstopped[1, 9:10].tolist()]
  out = generate(prompts, n=16, temperature=1.0, stop=stop)
  for b in range(3):
    length = length_until(unstopped[b].tolist(), stop)
    assert out.lengths[b] == length
    np.testing.assert_array_equal(out.tokens[b, :length], unstopped[b, :length])
    assert not out.tokens[b, length:].any()
  assert out.lengths[0] <= 7 and out.lengths[1] <= 10


def length_until(tokens, stop):
  """Returns the number of tokens up to the end of the first stop sequence."""
  for n in range(1, len(tokens) + 1):
    if any(tokens[max(n - len(sequence), 0) : n] == sequence for sequence in stop):
      return n
  return len(tokens)


def test_a_stop_sequence_that_begins_in_the_prompt_does_not_end_the_text():
  prompts = helpers.random_tokens(CONFIG, 1, 5)
  unstopped = generate(prompts, n=8).tokens[0].tolist()
  stop = [[int(prompts[0, -1]), unstopped[0]]]
  out = generate(prompts, n=8, stop=stop)
  length = length_until(unstopped, stop)
  assert length > 1  # it would be 1 if the prompt were part of the text
  assert out.lengths[0] == length
  assert out.tokens[0, :length].tolist() == unstopped[:length]


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(top_p=1.1), r"generate: top_p=1.1 must be a number in \(0, 1\]"),
    (dict(temperature=None), "generate: temperature=None must be a finite number of at least 0"),
    (
      dict(stop=[[3], []]),
      r"generate: stop=\[\[3\], \[\]\] must be a list of sequences of one or more",
    ),
    (dict(stop=[1, 13]), r"generate: stop=\[1, 13\] must be a list of sequences"),
    (dict(stop=[b"\n"]), "generate: stop=.* must be a list of sequences .* take texts"),
    (dict(logits=np.zeros((2, 10))), r"logits must have shape \[B=2, X=11\], got \(2, 10\)"),
    (dict(eos_id=11), r"eos_id=11 must be None, a token in \[0, 11\), or a list"),
    (dict(state=tvq.initial_state(CONFIG, 3)), "batch of 2"),
    (dict(n=2.5), "max_new_tokens=2.5 must be an integer of at least 1"),
    (dict(n=0), "max_new_tokens=0"),
    (dict(lengths=[1, 6]), r"lengths=\[1, 6\] must be one integer in \[0, 5\]"),
    (dict(lengths=[0, 5]), r"prompts\[0\] is empty: pass an `eos_id`"),
    (dict(lengths=[5]), r"lengths=\[5\]"),
    (dict(rng=jax.random.split(jax.random.key(0), 3)), "rng must be one key, or one for each of 2"),
  ],
)
def test_invalid_arguments_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    generate(helpers.random_tokens(CONFIG, 2, 5), **settings)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(rng=0), r"generate: rng must be a random key, such as jax.random.key\(0\), got 0"),
    (dict(logits=[[0.0] * 11] * 2), "generate: logits must be an array, got list"),
  ],
)
def test_arguments_of_a_wrong_type_are_refused(settings, message):
  with pytest.raises(TypeError, match=message):
    generate(helpers.random_tokens(CONFIG, 2, 5), **settings)


def test_logits_of_lower_precision_are_accepted():
  logits = jax.nn.one_hot(jnp.array([3, 4]), 11, dtype=jnp.bfloat16)
  out = generate(np.zeros((2, 0), np.int32), n=1, logits=logits, temperature=0.0)
  assert out.tokens[:, 0].tolist() == [3, 4] and out.logits.dtype == jnp.float32


def test_tokens_out_of_range_are_refused():
  with pytest.raises(ValueError, match=r"\[0, 11\), got 11...11"):
    generate(np.full((1, 3), 11))


def test_an_encoder_cannot_generate():
  config = CONFIG.replace(causal=False)
  params, prompts = helpers.random_params(config), np.zeros((1, 3), np.int32)
  with pytest.raises(ValueError, match="generate: causal=False: an encoder cannot predict"):
    tvq.generate(params, config, prompts, max_new_tokens=1, rng=jax.random.key(0))


def test_text_equals_the_output_of_generate_for_a_prompt_after_an_eos():
  prompts = ["", "Anne", "Captain Wentworth"]
  texts = continue_text(prompts)
  for prompt, text in zip(prompts, texts, strict=True):
    tokens = np.append(1, data.ByteVocabulary.encode(prompt))[None]
    settings = dict(max_new_tokens=20, rng=jax.random.key(0), eos_id=1)
    out = tvq.generate(TEXT_PARAMS, TEXT_CONFIG, tokens, **settings)
    assert text == data.ByteVocabulary.decode(out.tokens[0]).decode(errors="replace")
    assert text


def test_text_ends_before_a_stop_text():
  settings = dict(max_new_tokens=40, rng=jax.random.key(0))
  prompt = np.append(1, data.ByteVocabulary.encode("Anne"))[None]
  out = tvq.generate(TEXT_PARAMS, TEXT_CONFIG, prompt, **settings)
  tokens = np.asarray(out.tokens)[0]
  # Two bytes in a row, before the first eos.
  i = next(i for i in range(5, 40) if (tokens[i : i + 2] >= 3).all() and 1 not in tokens[:i])
  stop, text = (data.ByteVocabulary.decode(x) for x in (tokens[i : i + 2], tokens))
  expected = text[: text.find(stop)].decode(errors="replace")
  assert continue_text(["Anne"], 40, stop=[stop]) == [expected]


def test_text_needs_the_vocabulary_of_the_model():
  with pytest.raises(ValueError, match="n_vocab=11, not the 259"):
    tvq.continue_text(PARAMS, CONFIG, ["a"], max_new_tokens=1, rng=jax.random.key(0))


@pytest.mark.parametrize(
  "prompts, error, message",
  [
    ("text", ValueError, "prompts must be a list of texts, got one str"),
    (b"text", ValueError, "prompts must be a list of texts, got one bytes"),
    ([], ValueError, "prompts must be a list of at least one text"),
    (None, TypeError, "prompts must be a list of texts, got None"),
    (["Anne", 3], TypeError, r"prompts\[1\] must be a str or bytes, got 3"),
    (["Anne", "\ud800"], ValueError, r"prompts\[1\]=.* has a surrogate at 0"),
  ],
)
def test_text_needs_a_list_of_prompts(prompts, error, message):
  with pytest.raises(error, match=f"continue_text: {message}"):
    continue_text(prompts)


def test_prompts_may_be_an_array_of_texts():
  assert continue_text(np.array(["Anne", "Emma"])) == continue_text(["Anne", "Emma"])


def test_text_needs_a_list_of_stop_texts():
  with pytest.raises(ValueError, match="continue_text: stop must be a list of texts, got one str"):
    continue_text(["Anne"], stop="end")


def test_text_of_pieces_ends_before_a_stop_text_that_spans_tokens(pieces):
  config = helpers.tiny(n_vocab=pieces.size)
  params = helpers.random_params(config)

  def sample(**kwargs):
    settings = dict(max_new_tokens=30, rng=jax.random.key(0), vocabulary=pieces, **kwargs)
    return tvq.continue_text(params, config, ["Emma "], **settings)[0]

  text = sample()
  tokens = np.append(1, pieces.encode("Emma "))[None]
  out = tvq.generate(params, config, tokens, max_new_tokens=30, rng=jax.random.key(0), eos_id=1)
  assert text == pieces.decode(out.tokens[0]).decode(errors="replace")
  stop = next(text[i : i + 2] for i in range(3, 28) if text[i : i + 2].isascii())
  assert sample(stop=[stop]) == text[: text.find(stop)]
