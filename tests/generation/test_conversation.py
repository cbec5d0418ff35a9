"""A conversation: pieces that add up to the text, and a state that is kept."""

import jax
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.generation import conversation

import helpers

CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
PARAMS = helpers.random_params(CONFIG)
KEY = jax.random.key(0)


def talk(**kwargs):
  return tvq.Conversation(PARAMS, CONFIG, **{"rng": KEY, "temperature": 0.9, **kwargs})


def whole(prompt, n, **kwargs):
  return tvq.continue_text(
    PARAMS, CONFIG, [prompt], max_new_tokens=n, rng=KEY, temperature=0.9, **kwargs
  )[0]


@pytest.mark.parametrize("prompt, n", [("", 40), ("Anne", 16), ("Käse", 37), (b"\xc3", 3)])
def test_pieces_add_up_to_the_text(prompt, n):
  pieces = list(talk().write(prompt, max_new_tokens=n))
  assert "".join(pieces) == whole(prompt, n) and all(pieces)


def test_characters_of_several_bytes_are_never_cut(monkeypatch):
  text = "Käse 🧀 und Brot ☃ " * 4
  raw = data.ByteVocabulary.encode(text)
  monkeypatch.setattr(conversation, "_CHUNK", 3)
  place = 0

  def write(config, weights, now, keys, sampling, limit, *, n, eos_id, stop):
    nonlocal place
    tokens = np.zeros((1, n), np.int32)
    part = raw[place : place + limit]
    tokens[0, : len(part)] = part
    place += len(part)
    ended = np.array([place == len(raw)])
    return conversation.generate_lib.Drawn(tokens, None, [len(part)]), now._replace(ended=ended)

  monkeypatch.setattr(conversation.generate_lib, "write", write)
  monkeypatch.setattr(data.ByteVocabulary, "EOS", int(raw[-1]))
  pieces = list(talk().write("x", max_new_tokens=1000))
  assert "".join(pieces) == text.rstrip(" ") + " " and "�" not in "".join(pieces)
  assert len(pieces) > 10


def test_stop_texts_are_held_back():
  free = whole("Anne", 40)
  raw = free.encode()
  stop = raw[20:25]  # begins in one piece and ends in another
  got = "".join(talk().write("Anne", max_new_tokens=40, stop=[stop]))
  assert got == whole("Anne", 40, stop=[stop])
  assert conversation._held_back([1, 2, 3], [[3, 4], [2, 3, 9]]) == 2
  assert conversation._held_back([1, 2, 3], [[1, 2]]) == 0


def test_the_state_goes_on_over_prompts():
  conversing = talk(temperature=0.0)
  first = "".join(conversing.write("Emma ", max_new_tokens=10))
  second = "".join(conversing.write("went", max_new_tokens=10))
  out = tvq.generate(
    PARAMS,
    CONFIG,
    np.append(1, data.ByteVocabulary.encode("Emma "))[None],
    max_new_tokens=10,
    rng=KEY,
    temperature=0.0,
  )
  then = tvq.generate(
    PARAMS,
    CONFIG,
    data.ByteVocabulary.encode("went")[None],
    state=out.state,
    max_new_tokens=10,
    rng=KEY,
    temperature=0.0,
  )
  decode = lambda out: data.ByteVocabulary.decode(out.tokens).decode(errors="replace")
  assert (first, second) == (decode(out), decode(then))
  assert int(conversing.state.position[0]) == 1 + 5 + 10 + 4 + 10
  helpers.assert_trees_close(conversing.state, then.state)
  resumed = talk(temperature=0.0, state=out.state)
  assert "".join(resumed.write("went", max_new_tokens=10)) == second


def test_a_reply_that_is_dropped_leaves_a_usable_state():
  conversing = talk()
  next(conversing.write("Anne ", max_new_tokens=64))
  assert int(conversing.state.position[0]) == 6 + conversation._CHUNK
  assert "".join(conversing.write("went", max_new_tokens=8))


def test_after_the_end_a_new_text_begins():
  free = tvq.generate(
    PARAMS,
    CONFIG,
    np.append(1, data.ByteVocabulary.encode("Anne"))[None],
    max_new_tokens=200,
    rng=KEY,
    temperature=3.0,
    eos_id=1,
  )
  assert free.lengths[0] < 200  # it does end
  conversing = talk(temperature=3.0)
  list(conversing.write("Anne", max_new_tokens=200))
  assert int(conversing.state.position[0]) == 0
  assert "".join(conversing.write("Käse", max_new_tokens=9)) == "".join(
    talk(temperature=3.0).write("Käse", max_new_tokens=9)
  )


def test_what_cannot_be_said():
  with pytest.raises(ValueError, match="Conversation: the model has n_vocab=11, not the 259"):
    tvq.Conversation({}, helpers.tiny(), rng=KEY)
  with pytest.raises(ValueError, match="temperature=-1"):
    talk(temperature=-1)
  with pytest.raises(ValueError, match="max_new_tokens=0"):
    talk().write("a", max_new_tokens=0)
  with pytest.raises(ValueError, match="a stop text must not be empty"):
    talk().write("a", max_new_tokens=1, stop=[""])
  with pytest.raises(ValueError, match="batch of 1"):
    talk(state=tvq.initial_state(CONFIG, 2))
  with pytest.raises(ValueError, match="must not be empty after a given state"):
    list(talk(state=tvq.initial_state(CONFIG, 1)).write("", max_new_tokens=1))
