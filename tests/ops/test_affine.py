"""Scaling and shifting rows equals its plain twin, in value and gradient."""

import jax
from jax.test_util import check_grads
import numpy as np
import pytest

from tvq_haiku.ops import affine


@pytest.fixture
def arguments():
  rng = jax.random.split(jax.random.key(0), 3)
  shapes = [(2, 3, 5), (5,), (5,)]
  return [jax.random.normal(key, shape) for key, shape in zip(rng, shapes, strict=True)]


def test_value_equals_its_plain_twin(arguments):
  np.testing.assert_array_equal(
    affine.scale_and_shift(*arguments), affine.plain_scale_and_shift(*arguments)
  )


def test_gradients(arguments):
  check_grads(
    affine.scale_and_shift, arguments, order=2, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2
  )


def test_a_gain_of_another_width_is_refused(arguments):
  x, gain, offset = arguments
  with pytest.raises(AssertionError):
    affine.scale_and_shift(x, gain[:3], offset[:3])
