"""Tests of sampling one token: which tokens, how often, and the keys of each prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.generation import sampling

PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
TOKENS = np.array([3, 0, 4, 1, 2])  # most probable first: TOKENS[i] has PROBABILITIES[i]


def sample_many(logits, n, **settings):
  """Samples n tokens from the same logits."""
  params = sampling.make_sampling_params(**settings)
  rngs = jax.random.split(jax.random.key(0), n)
  return np.asarray(jax.vmap(lambda rng: sampling.sample_token(rng, logits, params))(rngs))


def sample_counts(settings):
  """Returns how often each of TOKENS is sampled, most probable first."""
  logits = np.zeros(5, np.float32)
  logits[TOKENS] = np.log(PROBABILITIES)
  tokens = sample_many(jnp.asarray(logits), 4000, **settings)
  return np.bincount(tokens, minlength=5)[TOKENS]


@pytest.mark.parametrize(
  "settings, allowed",
  [
    (dict(), {0, 1, 2, 3, 4}),
    (dict(top_p=0.5), {0, 1}),
    (dict(top_p=0.4), {0}),
    (dict(top_p=0.01), {0}),
    (dict(top_p=0.71), {0, 1, 2}),
    (dict(top_k=2), {0, 1}),
    (dict(top_k=99), {0, 1, 2, 3, 4}),
    (dict(min_p=0.4), {0, 1, 2}),
    (dict(top_p=0.9, top_k=2, min_p=0.9), {0}),
    (dict(min_p=0.4, top_k=4), {0, 1, 2}),
    (dict(min_p=0.0), {0, 1, 2, 3, 4}),
    (dict(min_p=1.0), {0}),
    (dict(top_p=0.95, top_k=3), {0, 1, 2}),
    (dict(temperature=0.0), {0}),
    (dict(temperature=0.0, top_p=0.9, top_k=3), {0}),
  ],
)
def test_samples_only_allowed_tokens_in_proportion_to_their_probabilities(settings, allowed):
  counts = sample_counts(settings)
  kept = np.where([i in allowed for i in range(5)], PROBABILITIES, 0.0)
  np.testing.assert_allclose(counts / counts.sum(), kept / kept.sum(), atol=0.03)
  assert set(np.flatnonzero(counts)) <= allowed


@pytest.mark.parametrize("settings", [dict(), dict(top_p=0.999999)])
def test_temperature_is_the_inverse_power_of_the_probabilities(settings):
  counts = sample_counts(dict(temperature=0.5, **settings))
  np.testing.assert_allclose(
    counts / counts.sum(), PROBABILITIES**2 / (PROBABILITIES**2).sum(), atol=0.03
  )


@pytest.mark.parametrize(
  "settings, n_sort",
  [
    (dict(), 0),
    (dict(min_p=0.1), 0),
    (dict(temperature=0.0), 0),
    (dict(top_k=3), 1),
    (dict(top_p=0.9), 1),
    (dict(top_p=0.9, top_k=3, min_p=0.1), 1),
  ],
)
def test_sorts_at_most_once(settings, n_sort):
  params = sampling.make_sampling_params(**settings)
  jaxpr = jax.make_jaxpr(sampling.sample_token)(jax.random.key(0), jnp.zeros(50), params)
  assert str(jaxpr).count("top_k[") + str(jaxpr).count("sort[") == n_sort


def test_other_values_of_the_same_filters_do_not_recompile():
  n_trace = 0

  @jax.jit
  def sample(rng, logits, params):
    nonlocal n_trace
    n_trace += 1
    return sampling.sample_token(rng, logits, params)

  rng, logits = jax.random.key(0), jnp.zeros(5)
  for temperature, top_p, top_k, min_p in ((0.5, 0.9, 2, 0.1), (2.0, 0.5, 250, 0.0)):
    params = sampling.make_sampling_params(
      temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p
    )
    sample(rng, logits, params)
  assert n_trace == 1
  sample(rng, logits, sampling.make_sampling_params(temperature=0.5, top_p=0.9))
  assert n_trace == 2  # because min_p is disabled


@pytest.mark.parametrize("temperature", [1e-37, 1.2e-38, 1e-38, 1e-40, 5e-324])
@pytest.mark.parametrize("filters", [dict(), dict(top_p=0.9), dict(top_k=3), dict(min_p=0.5)])
def test_tiny_temperatures_take_the_most_probable_token(temperature, filters):
  logits = jnp.array([-50.0, 40.0, 60.0, 59.0])
  assert set(sample_many(logits, 20, temperature=temperature, **filters)) == {2}


@pytest.mark.parametrize("settings", [dict(top_p=1e-40), dict(top_p=5e-324), dict(top_k=1)])
def test_filters_keep_the_most_probable_token_even_if_p_is_rounded_to_zero(settings):
  assert set(sample_many(jnp.array([0.0, 1.0, 2.0, 1.5]), 20, **settings)) == {2}


def test_top_k_keeps_exactly_k_tokens_of_many():
  logits = jnp.asarray(np.random.default_rng(0).permutation(1000) / 1e4, jnp.float32)
  tokens = sample_many(logits, 4000, top_k=300)
  allowed = set(np.argsort(-logits)[:300].tolist())
  assert set(tokens.tolist()) <= allowed and len(set(tokens.tolist())) > 290
  assert len(set(sample_many(logits, 2000, top_k=10**12).tolist())) > 700


def test_top_p_keeps_only_some_of_equally_probable_tokens():
  tokens = sample_many(jnp.zeros(4), 200, top_p=0.5)
  assert len(set(tokens.tolist())) == 2


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(temperature=-1.0), "temperature=-1.0 must be a finite number of at least 0"),
    (dict(temperature=None), "temperature=None must be a finite number"),
    (dict(temperature="0.8"), "temperature='0.8' must be a finite number"),
    (dict(temperature=[0.8, 0.9]), r"temperature=\[0.8, 0.9\] must be a finite number"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=float("inf")), "temperature=inf"),
    (dict(top_p=0.0), r"top_p=0.0 must be a number in \(0, 1\]"),
    (dict(top_p=None), "top_p=None must be a number"),
    (dict(top_p=1.1), "top_p=1.1"),
    (dict(top_k=0), "top_k=0 must be an integer of at least 1"),
    (dict(top_k=1.5), "top_k=1.5"),
    (dict(min_p=2.0), r"min_p=2.0 must be None or a number in \[0, 1\]"),
    (dict(min_p=-0.1), "min_p=-0.1"),
  ],
)
def test_out_of_range_parameters_are_refused(settings, message):
  with pytest.raises(ValueError, match=f"caller: {message}"):
    sampling.make_sampling_params(caller="caller", **settings)


def test_example_rngs_depend_on_the_prompt_and_not_on_the_batch():
  a, b, c = np.array([1, 2]), np.array([1]), np.array([], np.int32)
  rng = jax.random.key(5)
  rngs = sampling.example_rngs(rng, [a, b, a, c])
  assert len({tuple(row) for row in jax.random.key_data(rngs).tolist()}) == 4
  assert sampling.example_rngs(rng, [b])[0] == rngs[1]
  assert sampling.example_rngs(rng, [b, a])[1] == rngs[0]


def test_example_rngs_take_one_key_for_each_prompt_or_an_old_style_key():
  prompts = [np.array([1, 2]), np.array([1])]
  rngs = jax.random.split(jax.random.key(0), 2)
  assert (sampling.example_rngs(rngs, prompts) == rngs).all()
  old_style = sampling.example_rngs(jax.random.PRNGKey(5), prompts)
  assert (old_style == sampling.example_rngs(jax.random.key(5), prompts)).all()
  with pytest.raises(ValueError, match=r"one for each of 3 prompts, got keys of shape \(2,\)"):
    sampling.example_rngs(rngs, [*prompts, np.array([3])])
  with pytest.raises(TypeError, match=r"f: rng must be a random key, such as .*, got 0"):
    sampling.example_rngs(0, prompts, caller="f")
