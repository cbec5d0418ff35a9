"""Scores of texts: each is what the model gives it alone, at any length."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data

import helpers

CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
PARAMS = helpers.random_params(CONFIG)
TEXTS = ["", "Anne", "It is a truth universally acknowledged.", b"\xff\x00bytes", "Käse 🧀" * 9]


def test_each_text_scores_what_one_forward_pass_gives_it():
  scores = tvq.score(PARAMS, CONFIG, TEXTS, batch_size=3, window_len=16)
  for i, text in enumerate(TEXTS):
    raw = text if isinstance(text, bytes) else text.encode()
    tokens = np.concatenate([[1], data.ByteVocabulary.encode(raw), [1]])
    n = len(raw) + 1
    padded = np.zeros((1, 160), np.int32)  # behind the text, where it changes nothing
    padded[0, :n] = tokens[:-1]
    logprobs = jax.nn.log_softmax(helpers.apply(CONFIG, PARAMS, padded).logits[0, :n])
    logprobs = jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)
    np.testing.assert_allclose(scores.logprobs[i], np.sum(logprobs), rtol=1e-5)
    assert (scores.n_byte[i], scores.n_token[i]) == (len(raw), len(raw) + 1)
  np.testing.assert_allclose(
    scores.bits_per_byte[1:], -scores.logprobs[1:] / math.log(2) / scores.n_byte[1:]
  )
  assert scores.bits_per_byte[0] == np.inf


def test_a_score_is_an_evaluation():
  text = TEXTS[2] * 5
  likelihood = tvq.evaluate(
    CONFIG, PARAMS, data.stream_of([data.ByteVocabulary.encode(text)]), batch_size=1, window_len=64
  )
  scores = tvq.score(PARAMS, CONFIG, [text], window_len=64)
  np.testing.assert_allclose(scores.bits_per_byte[0], likelihood.bits_per(len(text)), rtol=1e-6)


def test_what_cannot_be_scored():
  with pytest.raises(ValueError, match="must be a list of texts"):
    tvq.score(PARAMS, CONFIG, "Anne")
  with pytest.raises(ValueError, match="window_len=0 must be at least 1"):
    tvq.score(PARAMS, CONFIG, ["Anne"], window_len=0)
  with pytest.raises(ValueError, match="score: the model has n_vocab=11, not the 259"):
    tvq.score({}, helpers.tiny(), ["Anne"])
  with pytest.raises(ValueError, match="causal=False: an encoder sees"):
    tvq.score(PARAMS, CONFIG.replace(causal=False), ["Anne"])
  with pytest.raises(ValueError, match="params do not fit this config"):
    tvq.score(PARAMS, CONFIG.replace(d_k=8), ["Anne"])
