"""The state of the model: initial values, and functions of its batch axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import state as state_lib

import helpers
from helpers import VARIANTS, apply, tiny


@pytest.mark.parametrize("name", ["plain", "mha", "full"])
def test_size_of_the_state_does_not_depend_on_the_number_of_tokens(name):
  config = tiny(**VARIANTS[name])
  state = tvq.initial_state(config, 2)
  assert all(leaf.shape[:2] == (config.n_layer, 2) for leaf in jax.tree.leaves(state[2:]))
  for length in (1, 37):
    tokens = helpers.random_tokens(config, 2, length)
    after = apply(helpers.random_params(config), config, tokens).state
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert after.position.tolist() == [length, length]


@pytest.mark.parametrize("first", [0, 1])
def test_map_batch_axis_finds_the_batch_in_every_field(first):
  config = tiny(n_layer=3)
  state = jax.tree.map(lambda x: x[(None,) * first], tvq.initial_state(config, 5))
  axes = []

  def take_batch_element_4(x, axis):
    assert x.shape[axis] == 5
    axes.append(axis)
    return jnp.take(x, 4, axis=axis)

  taken = state_lib.map_batch_axis(take_batch_element_4, state, first=first)
  assert axes[:2] == [first, first] and set(axes[2:]) == {first + 1}
  assert taken.attention_1.cache_means.shape == (1,) * first + (3, 1, config.n_code, config.d_v)
  np.testing.assert_array_equal(taken.document, np.full((1,) * first, -1))


def test_a_batch_size_of_less_than_one_is_refused():
  with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
    tvq.initial_state(tiny(), 0)
