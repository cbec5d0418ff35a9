"""Batched products equal the einsums in their docstrings, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.ops import matmul


def normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


CASES = {
  "project": (matmul.project, "brnd,de->brne", normal(2, 3, 4, 5), normal(5, 6, seed=1)),
  "dots": (matmul.dots, "bgplk,bgmk->bgplm", normal(2, 3, 2, 4, 5), normal(2, 3, 6, 5, seed=1)),
  "dots per head": (
    matmul.dots_per_head,
    "bgrnk,gmk->bgrnm",
    normal(2, 3, 2, 4, 5),
    normal(3, 6, 5, seed=1),
  ),
  "dots of one head": (
    matmul.dots_per_head,
    "bgrnk,gmk->bgrnm",
    normal(2, 1, 2, 4, 5),
    normal(1, 6, 5, seed=1),
  ),
  "mix": (matmul.mix, "bgplm,bgmv->bgplv", normal(2, 3, 2, 4, 6), normal(2, 3, 6, 5, seed=1)),
  "pool": (matmul.pool, "bgnm,bgnv->bgmv", normal(2, 3, 4, 6), normal(2, 3, 4, 5, seed=1)),
  "pool of several row axes": (
    lambda x, y: matmul.pool(x, y, n_batch=2),
    "bgplm,bgplv->bgmv",
    normal(2, 3, 2, 4, 6),
    normal(2, 3, 2, 4, 5, seed=1),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_product_equals_its_einsum(name):
  product, equation, x, y = CASES[name]

  def loss(product, x, y):
    z = product(x, y)
    return jnp.sum(jnp.sin(z)), z

  got, want = (
    jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)(f, x, y)
    for f in (product, lambda x, y: jnp.einsum(equation, x, y))
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


def test_rows_of_another_batch_are_refused():
  with pytest.raises(AssertionError):
    matmul.dots(normal(2, 3, 4, 5), normal(3, 3, 6, 5))
