"""Scores of texts: each text of a batch is scored as if it were alone, at any length."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.evaluation import scoring

import helpers

pytestmark = pytest.mark.slow

CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
PARAMS = helpers.random_params(CONFIG)
TEXTS = ["", "Anne", "It is a truth universally acknowledged.", b"\xff\x00bytes", "Käse 🧀" * 9]
EOS = data.ByteVocabulary.EOS


def logprob_of_one_pass(raw):
  """Returns the log-probability of a text and its eos from one forward pass."""
  tokens = np.concatenate([[EOS], data.ByteVocabulary.encode(raw), [EOS]])
  n = len(raw) + 1
  padded = np.zeros((1, 160), np.int32)  # one shape for all texts; a causal model ignores the rest
  padded[0, :n] = tokens[:-1]
  logprobs = jax.nn.log_softmax(helpers.apply(PARAMS, CONFIG, padded).logits[0, :n])
  return jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1).sum()


@pytest.mark.parametrize("batch_size, window_len", [(3, 16), (1, 7), (8, 512)])
def test_each_text_scores_like_one_forward_pass(batch_size, window_len):
  scores = tvq.score(PARAMS, CONFIG, TEXTS, batch_size=batch_size, window_len=window_len)
  for i, text in enumerate(TEXTS):
    raw = text if isinstance(text, bytes) else text.encode()
    np.testing.assert_allclose(scores.logprobs[i], logprob_of_one_pass(raw), rtol=1e-5)
    assert (scores.n_byte[i], scores.n_token[i]) == (len(raw), len(raw) + 1)


def test_bits_per_byte_of_an_empty_text_are_infinite():
  scores = tvq.score(PARAMS, CONFIG, ["", "Anne"])
  assert scores.bits_per_byte[0] == np.inf
  np.testing.assert_allclose(scores.bits_per_byte[1], -scores.logprobs[1] / math.log(2) / 4)


def test_empty_list_of_texts_has_no_scores():
  assert all(len(field) == 0 for field in tvq.score(PARAMS, CONFIG, []))


def test_score_equals_evaluate():
  text = TEXTS[2] * 5
  likelihood = tvq.evaluate(
    PARAMS, CONFIG, data.stream_of([data.ByteVocabulary.encode(text)]), batch_size=1, window_len=64
  )
  scores = tvq.score(PARAMS, CONFIG, [text], window_len=64)
  np.testing.assert_allclose(scores.bits_per_byte[0], likelihood.bits_per(len(text)), rtol=1e-6)


@pytest.mark.slow
def test_texts_of_many_lengths_share_compiled_programs():
  scoring._window_nats.clear_cache()
  tvq.score(PARAMS, CONFIG, ["x" * n for n in range(10, 30)], batch_size=1)
  assert scoring._window_nats._cache_size() == 2  # for windows of 16 and of 32 tokens
  for n_text in (3, 4, 7):
    tvq.score(PARAMS, CONFIG, ["x" * 9] * n_text, batch_size=4)
  assert scoring._window_nats._cache_size() == 3


def test_arrays_of_texts_are_accepted():
  expected = tvq.score(PARAMS, CONFIG, ["Anne", "Käse"]).logprobs
  for texts in (
    np.array(["Anne", "Käse"]),
    np.array([b"Anne", "Käse".encode()]),
    np.array(["Anne", "Käse"], object),
    (text for text in ("Anne", "Käse")),
  ):
    np.testing.assert_array_equal(tvq.score(PARAMS, CONFIG, texts).logprobs, expected)


@pytest.mark.parametrize(
  "texts, message",
  [
    (["ok", None], r"score: texts\[1\] must be a str or bytes, got None"),
    (np.array([1, 2]), r"score: texts\[0\] must be a str or bytes, got 1"),
    (None, "score: texts must be a list of texts, got None"),
    (3, "score: texts must be a list of texts, got 3"),
  ],
)
def test_texts_of_a_wrong_type_are_named(texts, message):
  with pytest.raises(TypeError, match=message):
    tvq.score(PARAMS, CONFIG, texts)


@pytest.mark.parametrize("text, kind", [("Anne", "str"), (b"Anne", "bytes")])
def test_a_single_text_is_rejected(text, kind):
  with pytest.raises(ValueError, match=f"must be a list of texts, got one {kind}"):
    tvq.score(PARAMS, CONFIG, text)


@pytest.mark.parametrize("name", ["batch_size", "window_len"])
def test_sizes_below_one_are_rejected(name):
  for value in (0, 1.5, None):
    with pytest.raises(ValueError, match=f"score: {name}={value} must be an integer of at least 1"):
      tvq.score(PARAMS, CONFIG, ["Anne"], **{name: value})


def test_models_that_do_not_predict_bytes_are_rejected():
  with pytest.raises(ValueError, match="score: the model has n_vocab=11, not the 259"):
    tvq.score(helpers.random_params(helpers.tiny()), helpers.tiny(), ["Anne"])
  with pytest.raises(ValueError, match="score: causal=False: an encoder cannot predict"):
    tvq.score(PARAMS, CONFIG.replace(causal=False), ["Anne"])
  with pytest.raises(ValueError, match=r"params .* has shape"):
    tvq.score(PARAMS, CONFIG.replace(d_k=8), ["Anne"])
