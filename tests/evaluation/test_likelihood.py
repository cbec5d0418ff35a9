"""The likelihood of a stream: every token counts once, for any batch size and window length."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.evaluation import likelihood as likelihood_lib

import helpers

pytestmark = pytest.mark.slow

CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
TRAIN = tvq.TrainConfig(sequence_len=32, update_len=16, global_batch_size=2)
PARAMS = helpers.random_params(CONFIG)
STREAM = data.stream_of([data.ByteVocabulary.encode(data.austen()["Emma"][:300])])


def batch_of_two():
  tokens = jnp.asarray(helpers.random_tokens(CONFIG, 2, 33))
  ones = jnp.ones((2, 32), jnp.int32)
  return dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], doc_ids=0 * ones, loss_mask=ones)


def nats_of_one_pass(inputs, targets):
  """Returns the negative log-likelihood of one sequence of tokens from one forward pass."""
  logits = helpers.apply(PARAMS, CONFIG, inputs[None]).logits[0]
  logprobs = jax.nn.log_softmax(logits)
  return -float(jnp.take_along_axis(logprobs, targets[:, None], axis=1).sum())


@pytest.mark.parametrize("batch_size, window_len", [(1, 50), (1, 301), (3, 64)])
def test_every_token_counts_once(batch_size, window_len):
  likelihood = tvq.evaluate(PARAMS, CONFIG, STREAM, batch_size=batch_size, window_len=window_len)
  tokens = STREAM.take(np.arange(301))
  part = -(-301 // batch_size)
  expected = sum(
    nats_of_one_pass(
      tokens["inputs"][start : start + part], tokens["targets"][start : start + part]
    )
    for start in range(0, 301, part)
  )
  assert likelihood.tokens == 301
  np.testing.assert_allclose(likelihood.nats, expected, rtol=1e-5)


def test_aligned_parts_do_not_split_documents():
  """Two parts of 301 tokens begin at 0 and 151, or at 0 and 160 if aligned to 32."""
  tokens = STREAM.take(np.arange(301))
  expected = sum(
    nats_of_one_pass(tokens["inputs"][part], tokens["targets"][part])
    for part in (slice(0, 160), slice(160, 301))
  )
  aligned = tvq.evaluate(PARAMS, CONFIG, STREAM, batch_size=2, align=32)
  unaligned = tvq.evaluate(PARAMS, CONFIG, STREAM, batch_size=2)
  np.testing.assert_allclose(aligned.nats, expected, rtol=1e-5)
  assert abs(unaligned.nats - expected) > 1e-3 and aligned.tokens == unaligned.tokens == 301


def test_masked_tokens_do_not_count():
  batch = batch_of_two()
  masked = {**batch, "loss_mask": batch["loss_mask"].at[:, 20:].set(0)}
  step = tvq.make_eval_step(CONFIG, TRAIN)
  sums, _ = step(PARAMS, masked, tvq.initial_state(CONFIG, 2))
  start = {key: value[:, :20] for key, value in batch.items()}
  expected, _ = step(PARAMS, start, tvq.initial_state(CONFIG, 2))
  np.testing.assert_allclose(sums, expected, rtol=1e-5)
  assert float(sums.tokens) == 40


def test_the_state_carries_context_from_window_to_window():
  batch, step = batch_of_two(), tvq.make_eval_step(CONFIG)
  full, _ = step(PARAMS, batch, tvq.initial_state(CONFIG, 2))
  state, nats = tvq.initial_state(CONFIG, 2), 0.0
  for window in (slice(0, 20), slice(20, 32)):
    sums, state = step(PARAMS, {key: x[:, window] for key, x in batch.items()}, state)
    nats += float(sums.nats)
  np.testing.assert_allclose(nats, float(full.nats), rtol=1e-5)


def test_batches_of_another_size_are_rejected():
  batch = {key: x[:1] for key, x in batch_of_two().items()}
  state = tvq.initial_state(CONFIG, 1)
  with pytest.raises(ValueError, match=r"must have shape \(2, 32\).*got \(1, 32\)"):
    tvq.make_eval_step(CONFIG, TRAIN)(PARAMS, batch, state)
  sums, _ = tvq.make_eval_step(CONFIG)(PARAMS, batch, state)
  assert float(sums.tokens) == 32


def test_stop_is_checked_before_each_window():
  class StopAtThird:
    checks = 0

    def __bool__(self):
      self.checks += 1
      return self.checks == 3

  stop = StopAtThird()
  assert tvq.evaluate(PARAMS, CONFIG, STREAM, batch_size=1, window_len=64, stop=stop) is None
  assert stop.checks == 3


def test_units_of_likelihood():
  likelihood = tvq.Likelihood(nats=12.0 * math.log(2), tokens=6)
  assert likelihood.nats_per_token == 2.0 * math.log(2)
  assert likelihood.bits_per(4) == 3.0
  np.testing.assert_allclose(likelihood.perplexity_per(4), 8.0)


@pytest.mark.parametrize("nats, units", [(3.0, 0), (1400.0, 2), (800.0, 1)])
def test_perplexity_beyond_the_range_of_floats_is_infinite(nats, units):
  assert tvq.Likelihood(nats=nats, tokens=1).perplexity_per(units) == math.inf


@pytest.mark.parametrize("name", ["batch_size", "window_len", "align"])
def test_sizes_below_one_are_rejected(name):
  for value in (0, None, 1.5, "8"):
    with pytest.raises(
      ValueError, match=f"evaluate: {name}={value!r} must be an integer of at lea"
    ):
      tvq.evaluate(PARAMS, CONFIG, STREAM, **{name: value})


def test_models_that_do_not_predict_tokens_are_rejected():
  with pytest.raises(ValueError, match="evaluate: causal=False: an encoder cannot predict"):
    tvq.evaluate(PARAMS, CONFIG.replace(causal=False), STREAM)
  with pytest.raises(ValueError, match="evaluate: no_emb=True: the model reads features"):
    tvq.evaluate(PARAMS, CONFIG.replace(no_emb=True), STREAM)


def test_arguments_of_a_wrong_type_are_named():
  with pytest.raises(TypeError, match=r"evaluate: stream must be a TokenStream, .* got str"):
    tvq.evaluate(PARAMS, CONFIG, "text")
  with pytest.raises(TypeError, match="evaluate: config must be a TransformerConfig, got dict"):
    tvq.evaluate(CONFIG, PARAMS, STREAM)


def test_evaluations_of_the_same_shapes_are_compiled_once():
  evaluate = lambda: tvq.evaluate(PARAMS, CONFIG, STREAM, batch_size=2, window_len=48)
  evaluate()
  n_compiled = likelihood_lib._eval_step._cache_size()
  assert n_compiled > 0
  evaluate()
  assert likelihood_lib._eval_step._cache_size() == n_compiled
