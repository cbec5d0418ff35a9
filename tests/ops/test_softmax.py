"""Softmax over several sets of keys equals softmax over their concatenation."""

import jax
from jax.test_util import check_grads
import numpy as np

from tvq_haiku.ops import softmax


def random_sets(*, rows=(2, 3), n_keys=(4, 1, 6), width=5):
  rng = jax.random.split(jax.random.key(0), 2 * len(n_keys))
  scores = [jax.random.normal(key, (2, *rows, n)) for key, n in zip(rng, n_keys, strict=False)]
  values = [
    jax.random.normal(key, (2, n, width)) for key, n in zip(rng[len(n_keys) :], n_keys, strict=True)
  ]
  return scores, values


def test_mix_equals_its_plain_twin():
  scores, values = random_sets()
  np.testing.assert_allclose(
    softmax.softmax_mix(scores, values), softmax.plain_softmax_mix(scores, values), atol=1e-6
  )


def test_gradients():
  check_grads(
    softmax.softmax_mix, random_sets(), order=2, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2
  )


def test_gradients_equal_those_of_its_plain_twin():
  sets = random_sets()

  def loss(mix, *sets):
    return (mix(*sets) ** 2).sum()

  got, want = (
    jax.grad(loss, argnums=(1, 2))(mix, *sets)
    for mix in (softmax.softmax_mix, softmax.plain_softmax_mix)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_a_row_of_masked_keys_has_finite_gradients():
  scores, values = random_sets()
  scores = [x.at[0, 0].set(softmax.MASKED) for x in scores]
  gradients = jax.grad(lambda s, v: softmax.softmax_mix(s, v).sum(), argnums=(0, 1))(scores, values)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_weights_of_all_sets_sum_to_one():
  weights = softmax.softmax_weights(random_sets()[0])
  np.testing.assert_allclose(sum(w.sum(axis=-1) for w in weights), 1.0, atol=1e-6)
