"""Tests of conversations: chunks add up to the text, and the state is kept between prompts."""

import jax
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.generation import conversation as conversation_lib
from tvq_haiku.generation import sample_loop

import helpers

pytestmark = pytest.mark.slow

CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
PARAMS = helpers.random_params(CONFIG)
RNG = jax.random.key(0)


def start_conversation(**kwargs):
  return tvq.Conversation(PARAMS, CONFIG, **{"rng": RNG, "temperature": 0.9, **kwargs})


def continue_text(prompt, n, **kwargs):
  settings = dict(max_new_tokens=n, rng=RNG, temperature=0.9, **kwargs)
  return tvq.continue_text(PARAMS, CONFIG, [prompt], **settings)[0]


def generate(tokens, n, **kwargs):
  return tvq.generate(PARAMS, CONFIG, tokens[None], max_new_tokens=n, rng=RNG, **kwargs)


def decode(out):
  return data.ByteVocabulary.decode(out.tokens).decode(errors="replace")


@pytest.mark.parametrize("prompt, n", [("", 40), ("Anne", 16), ("Käse", 37), (b"\xc3", 3)])
def test_chunks_add_up_to_the_text_of_continue_text(prompt, n):
  conversation = start_conversation()
  chunks = list(conversation.write(prompt, max_new_tokens=n))
  rest = conversation.pending.decode(errors="replace")  # of a character that is not complete
  assert "".join(chunks) + rest == continue_text(prompt, n)
  assert all(chunks)


def write_bytes(monkeypatch, content):
  """Makes the model write `content`, after which it would write spaces."""
  tokens = data.ByteVocabulary.encode(content + b" " * 100)
  n_sampled = 0

  def sample_tokens(weights, config, state, rngs, params, limit, *, chunk_len, stop):
    nonlocal n_sampled
    chunk = tokens[n_sampled : n_sampled + limit]
    n_sampled += limit
    padded = np.pad(chunk, (0, chunk_len - limit))[None]
    return sample_loop.SampledTokens(padded, None, [limit]), state

  monkeypatch.setattr(sample_loop, "sample_tokens", sample_tokens)


def test_a_character_that_is_cut_is_completed_by_the_next_call(monkeypatch):
  write_bytes(monkeypatch, "日本🧀!".encode())
  conversation = start_conversation()
  assert list(conversation.write("日", max_new_tokens=8)) == ["日本"]
  assert conversation.pending == "🧀".encode()[:2]
  assert list(conversation.write("", max_new_tokens=1)) == []
  assert list(conversation.write("", max_new_tokens=2)) == ["🧀!"]
  assert conversation.pending == b""


def test_a_new_prompt_drops_the_bytes_of_a_cut_character(monkeypatch):
  write_bytes(monkeypatch, "日".encode()[:2] + b"abc")
  conversation = start_conversation()
  assert list(conversation.write("x", max_new_tokens=2)) == []
  assert list(conversation.write("y", max_new_tokens=3)) == ["abc"]


def test_bytes_that_an_abandoned_iterator_held_back_are_not_lost(monkeypatch):
  write_bytes(monkeypatch, b"0123456789abcdEND")
  monkeypatch.setattr(conversation_lib, "_CHUNK_LEN", 16)
  conversation = start_conversation()
  assert next(conversation.write("x", max_new_tokens=64, stop=["END"])) == "0123456789abcd"
  assert conversation.pending == b"EN"
  assert list(conversation.write("", max_new_tokens=1)) == ["END"]


def test_no_character_is_split_between_chunks(monkeypatch):
  text = "Käse 🧀 und Brot ☃ " * 4
  tokens = data.ByteVocabulary.encode(text)
  n_sampled = 0

  def sample_tokens(weights, config, state, rngs, params, limit, *, chunk_len, stop):
    nonlocal n_sampled
    chunk = tokens[n_sampled : n_sampled + limit]
    n_sampled += len(chunk)
    padded = np.pad(chunk, (0, chunk_len - len(chunk)))
    sampled = sample_loop.SampledTokens(padded[None], None, [len(chunk)])
    return sampled, state._replace(ended=np.array([n_sampled == len(tokens)]))

  monkeypatch.setattr(conversation_lib, "_CHUNK_LEN", 3)
  monkeypatch.setattr(sample_loop, "sample_tokens", sample_tokens)
  chunks = list(start_conversation().write("x", max_new_tokens=1000))
  assert "".join(chunks) == text
  assert len(chunks) > 10


def test_a_stop_text_is_not_yielded_even_in_part():
  prompt = np.append(1, data.ByteVocabulary.encode("Anne"))
  text = data.ByteVocabulary.decode(generate(prompt, 40, temperature=0.9).tokens)
  stop = text[14:18]  # begins in the first chunk and ends in the second
  assert text.find(stop) == 14
  chunks = list(start_conversation().write("Anne", max_new_tokens=40, stop=[stop]))
  assert "".join(chunks) == text[:14].decode(errors="replace")
  assert "".join(chunks) == continue_text("Anne", 40, stop=[stop])


def test_the_state_is_kept_between_prompts():
  conversation = start_conversation(temperature=0.0)
  first = "".join(conversation.write("Emma ", max_new_tokens=10))
  second = "".join(conversation.write("went", max_new_tokens=10))
  prompts = [np.append(1, data.ByteVocabulary.encode("Emma ")), data.ByteVocabulary.encode("went")]
  out_1 = generate(prompts[0], 10, temperature=0.0)
  out_2 = generate(prompts[1], 10, temperature=0.0, state=out_1.state)
  assert (first, second) == (decode(out_1), decode(out_2))
  assert int(conversation.state.position[0]) == 1 + 5 + 10 + 4 + 10
  helpers.assert_trees_close(conversation.state, out_2.state)
  resumed = start_conversation(temperature=0.0, state=out_1.state)
  assert "".join(resumed.write("went", max_new_tokens=10)) == second


def test_a_conversation_continues_after_an_iterator_is_dropped():
  conversation = start_conversation()
  next(conversation.write("Anne ", max_new_tokens=64))
  state = conversation.state
  assert int(state.position[0]) == 6 + conversation_lib._CHUNK_LEN
  out = generate(data.ByteVocabulary.encode("went"), 8, temperature=0.9, state=state)
  assert "".join(conversation.write("went", max_new_tokens=8)) == decode(out)


def test_an_empty_prompt_continues_the_last_text():
  conversation = start_conversation(temperature=0.0)
  text = "".join(conversation.write("Anne", max_new_tokens=9))
  text += "".join(conversation.write("", max_new_tokens=11))
  out = generate(np.append(1, data.ByteVocabulary.encode("Anne")), 20, temperature=0.0)
  assert text == decode(out)


def test_the_prompt_after_an_eos_starts_a_new_text():
  tokens = np.append(1, data.ByteVocabulary.encode("Anne"))
  assert generate(tokens, 200, temperature=3.0, eos_id=1).lengths[0] < 200
  conversation = start_conversation(temperature=3.0)
  list(conversation.write("Anne", max_new_tokens=200))
  assert int(conversation.state.position[0]) == 0
  fresh = start_conversation(temperature=3.0)
  assert list(conversation.write("Käse", max_new_tokens=9)) == list(
    fresh.write("Käse", max_new_tokens=9)
  )


@pytest.mark.parametrize("text_before", ["Anne", None])
def test_a_conversation_from_a_saved_state_continues_bit_for_bit(tmp_path, text_before):
  conversation = start_conversation()
  if text_before:
    list(conversation.write(text_before, max_new_tokens=7))
  saved = dict(logits=conversation.logits, pending=conversation.pending)
  tvq.save_state(conversation.state, CONFIG, tmp_path / "state", **saved)
  loaded = start_conversation(**tvq.load_state(CONFIG, tmp_path / "state")._asdict())
  for prompt in ("", " and", ""):
    expected = list(conversation.write(prompt, max_new_tokens=21))
    assert list(loaded.write(prompt, max_new_tokens=21)) == expected
    helpers.assert_same(loaded.state, conversation.state)
    helpers.assert_same(loaded.logits, conversation.logits)
    assert loaded.pending == conversation.pending


class TestPieces:
  """Tokens are subwords: a stop text may begin or end inside of a token."""

  def model(self, pieces):
    config = CONFIG.replace(n_vocab=pieces.size)
    return helpers.random_params(config), config

  def start(self, pieces):
    return tvq.Conversation(*self.model(pieces), rng=RNG, vocabulary=pieces)

  def sample_tokens(self, pieces):
    """Returns 40 tokens that `generate` samples after the prompt "Emma "."""
    prompt = np.append(1, pieces.encode("Emma "))[None]
    out = tvq.generate(*self.model(pieces), prompt, max_new_tokens=40, rng=RNG, eos_id=1)
    assert out.lengths[0] == 40
    return out.tokens[0]

  def test_chunks_add_up_to_the_bytes_of_the_tokens(self, pieces):
    talk = self.start(pieces)
    text = "".join(talk.write("Emma ", max_new_tokens=40))
    raw = pieces.decode(self.sample_tokens(pieces))
    assert text + talk.pending.decode(errors="replace") == raw.decode(errors="replace")

  def test_the_state_ends_with_the_token_that_completes_a_stop_text(self, pieces):
    tokens = self.sample_tokens(pieces)
    ends = np.cumsum([len(pieces.decode([token])) for token in tokens])
    raw = pieces.decode(tokens)
    i = next(i for i in range(4, 40) if ends[i] - ends[i - 1] > 1)  # a token of several bytes
    stop = raw[ends[i] - 3 : ends[i] - 1]  # ends inside of it
    begin = raw.find(stop)
    n = int(np.searchsorted(ends, begin + len(stop))) + 1
    talk, shorter = self.start(pieces), self.start(pieces)
    text = "".join(talk.write("Emma ", max_new_tokens=40, stop=[stop]))
    assert text == raw[:begin].decode(errors="replace")
    list(shorter.write("Emma ", max_new_tokens=n))
    helpers.assert_same(talk.state, shorter.state)
    helpers.assert_same(talk.logits, shorter.logits)


def test_invalid_arguments_are_refused():
  with pytest.raises(ValueError, match="Conversation: the model has n_vocab=11, not the 259"):
    config = helpers.tiny()
    tvq.Conversation(helpers.random_params(config), config, rng=RNG)
  with pytest.raises(TypeError, match=r"Conversation: rng must be a random key, .* got 0"):
    start_conversation(rng=0)
  with pytest.raises(ValueError, match="Conversation: rng must be one key"):
    start_conversation(rng=jax.random.split(RNG))
  with pytest.raises(TypeError, match="Conversation: vocabulary='bytes' must be"):
    start_conversation(vocabulary="bytes")
  with pytest.raises(TypeError, match="Conversation: prompt must be a str or bytes, got a list"):
    start_conversation().write(["a"], max_new_tokens=1)
  with pytest.raises(ValueError, match="Conversation: temperature=-1"):
    start_conversation(temperature=-1)
  with pytest.raises(ValueError, match="batch of 1"):
    start_conversation(state=tvq.initial_state(CONFIG, 2))
  with pytest.raises(ValueError, match="max_new_tokens=0 must be an integer of at least 1"):
    start_conversation().write("a", max_new_tokens=0)
  with pytest.raises(ValueError, match=r"stop=\[''\]: a stop text must not be empty"):
    start_conversation().write("a", max_new_tokens=1, stop=[""])
  state = generate(np.array([1, 70]), 1).state
  with pytest.raises(ValueError, match="first prompt must not be empty if a `state` was given"):
    start_conversation(state=state).write("", max_new_tokens=1)


def test_an_initial_state_starts_a_new_text():
  conversation = start_conversation(state=tvq.initial_state(CONFIG, 1))
  expected = list(start_conversation().write("", max_new_tokens=9))
  assert list(conversation.write("", max_new_tokens=9)) == expected
