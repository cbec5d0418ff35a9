"""The compressive cache: merges in any grouping, over any length, and their gradients."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from tvq_haiku.attention import compressive_cache

B, G, R, N, S, V = 2, 2, 7, 3, 4, 5


def random_tokens(seed=0):
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, S, (B, G, R, N)).astype(np.int32)
  codes[:, :, -1, 1:] = compressive_cache.EMPTY  # a chunk that is not full
  codes[1, :, 2] = compressive_cache.EMPTY  # an empty chunk
  docs = np.sort(rng.integers(0, 4, (B, 1, R * N)), axis=-1).reshape(B, 1, R, N).astype(np.int32)
  return codes, rng.standard_normal((B, G, R, N, V)).astype(np.float32), docs


def empty():
  return compressive_cache.Cache(
    jnp.zeros((B, G, 1, S)),
    jnp.zeros((B, G, 1, S, V)),
    jnp.full((B, 1, 1), compressive_cache.NO_DOCUMENT),
  )


@pytest.mark.parametrize("reduction", ["serial", "matmul", "assoc_scan"])
@pytest.mark.parametrize("warm", [False, True])
def test_prefixes_equal_sums_over_all_earlier_tokens(reduction, warm):
  codes, values, docs = random_tokens()
  chunks = compressive_cache.summarize(codes, values, docs, S)
  start, skip = empty(), 0
  if warm:  # the first chunks are in the cache of the state
    start, skip = (
      jax.tree.map(lambda x: x[:, :, 3:4], compressive_cache.prefixes(empty(), chunks, "serial")),
      3,
    )
  got = compressive_cache.prefixes(start, jax.tree.map(lambda x: x[:, :, skip:], chunks), reduction)
  for b in range(B):
    for r in range(skip, R + 1):
      seen = [
        (codes[b, :, i, n], docs[b, 0, i, n], values[b, :, i, n])
        for i in range(r)
        for n in range(N)
        if codes[b, 0, i, n] != compressive_cache.EMPTY
      ]
      doc = seen[-1][1] if seen else compressive_cache.NO_DOCUMENT
      assert int(got.doc_id[b, 0, r - skip]) == doc
      for g in range(G):
        for s in range(S):
          mine = [v[g] for z, d, v in seen if z[g] == s and d == doc]
          assert float(got.counts[b, g, r - skip, s]) == len(mine)
          mean = np.mean(mine, axis=0) if mine else np.zeros(V)
          np.testing.assert_allclose(got.means[b, g, r - skip, s], mean, atol=1e-6)


def test_each_value_gets_its_share_of_the_gradient_of_the_mean():
  codes, values, docs = random_tokens()
  docs[:] = 0

  def mean_of(code):
    return lambda values: jnp.sum(
      compressive_cache.prefixes(
        empty(), compressive_cache.summarize(codes, values, docs, S), "matmul"
      ).means[:, :, -1, code]
    )

  for code in (0, S - 1):
    gradient = jax.grad(mean_of(code))(values)
    own = codes == code
    shares = own / np.maximum(own.sum((2, 3), keepdims=True), 1)
    np.testing.assert_allclose(
      gradient, np.broadcast_to(shares[..., None], values.shape), atol=1e-6
    )


def one_code(count, mean):
  return compressive_cache.Cache(
    jnp.full((1, 1, 1, 1), count), jnp.full((1, 1, 1, 1, 1), mean), jnp.zeros((1, 1, 1), jnp.int32)
  )


def test_ten_million_tokens_through_one_cache():
  """Counts are exact and means correct to 1e-5 after 20,000 chunks of 512 tokens of one code."""
  n_chunk, n = 20_000, 512.0
  sums = np.random.default_rng(0).standard_normal(n_chunk).astype(np.float32) + 3.0

  def add(total, mean):
    return compressive_cache.merge(total, one_code(n, mean)), None

  start = one_code(0.0, 0.0)
  total, _ = jax.lax.scan(add, start, jnp.asarray(sums))
  assert float(total.counts[0, 0, 0, 0]) == n_chunk * n > 10**7
  np.testing.assert_allclose(total.means.ravel(), sums.astype(np.float64).mean(), rtol=1e-5)
  assert (
    float(compressive_cache.merge(total, one_code(1.0, 0.0)).counts[0, 0, 0, 0]) == n_chunk * n + 1
  )


def test_unknown_reduction():
  with pytest.raises(ValueError, match="reduction='scan' must be one of"):
    codes, values, docs = random_tokens()
    compressive_cache.prefixes(empty(), compressive_cache.summarize(codes, values, docs, S), "scan")


def test_sum_by_code_equals_its_plain_twin():
  codes, values, _ = random_tokens()

  def loss(sum_by_code, values):
    sums = sum_by_code(S, codes, values)
    return jnp.sum(jnp.sin(sums)), sums

  got, want = (
    jax.value_and_grad(loss, argnums=1, has_aux=True)(f, values)
    for f in (compressive_cache.sum_by_code, compressive_cache.plain_sum_by_code)
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)


def test_gradients_of_sum_by_code():
  codes, values, _ = random_tokens()
  check_grads(
    lambda values: compressive_cache.sum_by_code(S, codes, values),
    (values,),
    order=1,
    modes=["rev"],
    atol=1e-2,
    rtol=1e-2,
  )


def test_the_gradient_of_sum_by_code_has_the_dtype_of_the_values():
  codes, values, _ = random_tokens()
  values = jnp.asarray(values, jnp.bfloat16)
  gradient = jax.grad(lambda v: jnp.sum(compressive_cache.sum_by_code(S, codes, v)))(values)
  assert gradient.dtype == jnp.bfloat16
