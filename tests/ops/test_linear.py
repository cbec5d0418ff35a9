"""Linear functions with a given transpose pass every transformation, and use the transpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.ops import linear

RNGS = jax.random.split(jax.random.key(0), 4)
MATRIX, VECTOR = jax.random.normal(RNGS[0], (4, 3)), jax.random.normal(RNGS[1], (3,))
TANGENT, COTANGENT = jax.random.normal(RNGS[2], (3,)), jax.random.normal(RNGS[3], (4,))


def product(matrix, vector):
  """Multiplies a vector by the squares of a matrix, with a transpose that is 10 times too large."""
  return linear.linear_call(
    lambda m, x: (m**2) @ x, lambda m, y: 10.0 * (m**2).T @ y, matrix, vector
  )


def plain(matrix, vector):
  return (matrix**2) @ vector


def test_forward_mode_is_that_of_the_function():
  got = jax.jvp(product, (MATRIX, VECTOR), (MATRIX, TANGENT))
  want = jax.jvp(plain, (MATRIX, VECTOR), (MATRIX, TANGENT))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_reverse_mode_with_respect_to_operands_is_the_transpose():
  d_matrix, d_vector = jax.vjp(product, MATRIX, VECTOR)[1](COTANGENT)
  want_matrix, want_vector = jax.vjp(plain, MATRIX, VECTOR)[1](COTANGENT)
  np.testing.assert_allclose(d_vector, 10.0 * want_vector, rtol=1e-5)
  np.testing.assert_allclose(d_matrix, want_matrix, rtol=1e-5)


def test_the_transpose_of_the_transpose_is_the_function():
  def transposed(cotangent):
    return jax.vjp(product, MATRIX, VECTOR)[1](cotangent)[1]

  np.testing.assert_allclose(
    jax.jvp(transposed, (COTANGENT,), (COTANGENT,))[1], transposed(COTANGENT)
  )
  twice = jax.vjp(transposed, COTANGENT)[1](TANGENT)[0]
  np.testing.assert_allclose(twice, product(MATRIX, TANGENT), rtol=1e-5)


@pytest.mark.parametrize("axes", [(0, 0), (None, 1), (2, None)])
def test_mapped_calls_and_gradients_equal_those_of_the_elements(axes):
  matrix, vector = (
    x if axis is None else jnp.stack([x, 2 * x], axis=axis)
    for x, axis in zip((MATRIX, VECTOR), axes, strict=True)
  )

  def gradients(matrix, vector):
    return product(matrix, vector), jax.vjp(product, matrix, vector)[1](COTANGENT)

  got = jax.jit(jax.vmap(gradients, in_axes=axes))(matrix, vector)
  for i in range(2):
    element = [
      x if axis is None else jnp.take(x, i, axis=axis)
      for x, axis in zip((matrix, vector), axes, strict=True)
    ]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-5), got, gradients(*element)
    )


def test_gradients_through_loops_and_checkpoints():
  def loss(matrix, vector):
    def step(x, _):
      return jnp.tanh(product(matrix, x)[:3]), None

    return jnp.sum(jax.lax.scan(jax.checkpoint(step), vector, None, length=3)[0])

  for function in (loss, jax.jit(loss)):
    with_checkpoint = jax.grad(function, argnums=(0, 1))(MATRIX, VECTOR)
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x in with_checkpoint)


def test_operands_and_results_may_be_trees_and_unused():
  def swap(_, x):
    return {"a": x["b"], "b": x["a"]}

  def loss(x):
    return jnp.sum(linear.linear_call(swap, swap, (), {"a": x, "b": jnp.ones(3)})["b"] ** 2)

  np.testing.assert_allclose(jax.grad(loss)(VECTOR), 2 * VECTOR)
