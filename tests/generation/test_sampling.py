"""Drawing a token: from the allowed set, in proportion, with a key of the row's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.generation import sampling

PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
PLACE = np.array([3, 0, 4, 1, 2])  # likeliest first: token PLACE[i] has PROBABILITIES[i]


def draws(settings, n=4000):
  logits = np.zeros(5, np.float32)
  logits[PLACE] = np.log(PROBABILITIES)
  rules = sampling.make_sampling_params(**settings)
  keys = jax.random.split(jax.random.key(0), n)
  return np.asarray(
    jax.vmap(lambda key: sampling.sample_token(key, jnp.asarray(logits), rules))(keys)
  )


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
def test_draws_from_the_allowed_set_in_proportion(settings, allowed):
  counts = np.bincount(draws(settings), minlength=5)[PLACE]
  kept = np.where([i in allowed for i in range(5)], PROBABILITIES, 0.0)
  np.testing.assert_allclose(counts / counts.sum(), kept / kept.sum(), atol=0.03)
  assert set(np.flatnonzero(counts)) <= allowed


@pytest.mark.parametrize("settings", [dict(), dict(top_p=0.999999)])
def test_temperature_sharpens(settings):
  counts = np.bincount(draws(dict(temperature=0.5, **settings)), minlength=5)[PLACE]
  np.testing.assert_allclose(
    counts / counts.sum(), PROBABILITIES**2 / (PROBABILITIES**2).sum(), atol=0.03
  )


@pytest.mark.parametrize(
  "settings, sorts",
  [
    (dict(), 0),
    (dict(min_p=0.1), 0),
    (dict(temperature=0.0), 0),
    (dict(top_k=3), 1),
    (dict(top_p=0.9), 1),
    (dict(top_p=0.9, top_k=3, min_p=0.1), 1),
  ],
)
def test_sorts_at_most_once(settings, sorts):
  rules = sampling.make_sampling_params(**settings)
  text = str(
    jax.make_jaxpr(lambda key, x: sampling.sample_token(key, x, rules))(
      jax.random.key(0), jnp.zeros(50)
    )
  )
  assert text.count("top_k[") + text.count("sort[") == sorts


def test_equal_logits_are_cut_off_all_the_same():
  rules = sampling.make_sampling_params(top_p=0.5)
  keys = jax.random.split(jax.random.key(0), 200)
  drawn = jax.vmap(lambda key: sampling.sample_token(key, jnp.zeros(4), rules))(keys)
  assert len(set(drawn.tolist())) == 2


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(temperature=-1.0), "temperature=-1.0 must be a number, not negative"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=float("inf")), "inf"),
    (dict(top_p=0.0), r"top_p=0.0 must lie in \(0, 1\]"),
    (dict(top_p=1.1), "top_p=1.1"),
    (dict(top_k=0), "top_k=0 must be an integer, at least 1"),
    (dict(top_k=1.5), "top_k=1.5"),
    (dict(min_p=2.0), "min_p=2.0"),
    (dict(min_p=-0.1), "min_p=-0.1"),
  ],
)
def test_rules_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    sampling.make_sampling_params(**settings)


def test_keys_depend_on_the_prompt_and_not_on_the_batch():
  a, b, c = np.array([1, 2]), np.array([1]), np.array([], np.int32)
  keys = sampling.example_rngs(jax.random.key(5), [a, b, a, c])
  data = [tuple(row) for row in jax.random.key_data(keys).tolist()]
  assert len(set(data)) == 4
  assert (sampling.example_rngs(jax.random.key(5), [b])[0] == keys[1]).all()
  assert (sampling.example_rngs(jax.random.key(5), [b, a])[1] == keys[0]).all()
  own = jax.random.split(jax.random.key(0), 4)
  assert (sampling.example_rngs(own, [a, b, a, c]) == own).all()
  old_style = sampling.example_rngs(jax.random.PRNGKey(5), [a])
  assert (old_style[0] == keys[0]).all()
  with pytest.raises(ValueError, match="one for each of 3 rows"):
    sampling.example_rngs(own, [a, b, c])
