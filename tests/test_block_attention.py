"""The algorithm against the quadratic oracle, and its own symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import tvq_haiku as tvq

B, T, K, V, S = 2, 24, 4, 6, 5
SHORT = 12
DIVISORS = [1, 2, 3, 4, 6, 12]


def make_inputs(*, heads=1, kv_heads=1, length=T, mem_len=4, seed=0, n_code=S):
  keys = jax.random.split(jax.random.key(seed), 7)
  normal = jax.random.normal
  arrays = dict(
      q=normal(keys[0], (B, length, heads, K)), k=normal(keys[1], (B, length, kv_heads, K)),
      v=normal(keys[2], (B, length, kv_heads, V)))
  biases = dict(
      relative_keys=normal(keys[4], (mem_len + 1, heads, K)),
      content_bias=normal(keys[5], (heads, K)), position_bias=normal(keys[6], (heads, K)))
  codebook = normal(keys[3], (kv_heads, n_code, K))
  return arrays, codebook, biases


def cold_state(*, kv_heads=1, mem_len=4, n_code=S, batch=B):
  return tvq.initial_attention_state(
      batch_size=batch, n_kv_head=kv_heads, n_code=n_code, mem_len=mem_len, d_k=K, d_v=V)


def part(arrays, start, stop):
  return {name: x[:, start:stop] for name, x in arrays.items()}


def check_against_oracle(arrays, codebook, biases, *, mem_len, block_len, **settings):
  """Values and gradients of `vq_attention` and the oracle, under a random projection."""
  weight = jax.random.normal(jax.random.key(9), (*arrays["q"].shape[:3], V))
  state = cold_state(kv_heads=codebook.shape[0], mem_len=mem_len, n_code=codebook.shape[1])

  def ours(arrays, biases):
    out = tvq.vq_attention(**arrays, codebook=codebook, state=state, block_len=block_len,
                           **biases, **settings)
    return jnp.sum(weight * out.values), out.values

  def theirs(arrays, biases):
    values = oracle.attention(**arrays, codebook=codebook, mem_len=mem_len,
                              block_len=min(block_len, weight.shape[1]), **biases, **settings)
    return jnp.sum(weight * values), values

  (got, values), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(
      arrays, biases)
  # Not jitted: its small operations are compiled once for all tests.
  (want, expected), expected_gradients = jax.value_and_grad(
      theirs, argnums=(0, 1), has_aux=True)(arrays, biases)
  np.testing.assert_allclose(values, expected, atol=1e-5)
  np.testing.assert_allclose(got, want, rtol=1e-4)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    reference = dict(jax.tree_util.tree_leaves_with_path(expected_gradients))[path]
    assert float(jnp.abs(reference).max()) > 0.0 or weight.shape[1] == 1, path
    np.testing.assert_allclose(gradient, reference, atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize("mem_len", DIVISORS)
@pytest.mark.parametrize("block_len", DIVISORS)
def test_scan_equals_quadratic_oracle(block_len, mem_len):
  arrays, codebook, biases = make_inputs(length=SHORT, mem_len=mem_len)
  check_against_oracle(arrays, codebook, biases, mem_len=mem_len, block_len=block_len)


@pytest.mark.parametrize("length, block_len, mem_len", [(23, 5, 7), (7, 16, 3), (1, 4, 2), (17, 4, 40)])
def test_scan_equals_quadratic_oracle_at_any_length(length, block_len, mem_len):
  arrays, codebook, biases = make_inputs(length=length, mem_len=mem_len)
  check_against_oracle(arrays, codebook, biases, mem_len=mem_len, block_len=block_len)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
def test_scan_equals_quadratic_oracle_with_heads(heads, kv_heads):
  arrays, codebook, biases = make_inputs(heads=heads, kv_heads=kv_heads)
  check_against_oracle(arrays, codebook, biases, mem_len=4, block_len=6)


@pytest.mark.parametrize("block_len", [1, 6, 24])
def test_scan_equals_quadratic_oracle_without_cache(block_len):
  arrays, codebook, biases = make_inputs()
  check_against_oracle(arrays, codebook, biases, mem_len=4, block_len=block_len, agg_cache=False)


@pytest.mark.parametrize("block_len, mem_len", [(1, 4), (4, 4), (6, 2), (24, 4), (5, 1)])
def test_scan_equals_quadratic_oracle_with_documents(block_len, mem_len):
  arrays, codebook, biases = make_inputs(mem_len=mem_len)
  doc_ids = jnp.array([[0] * 3 + [4] * 15 + [7] * 6, [2] * 20 + [3] + [5] * 3], jnp.int32)
  check_against_oracle(arrays, codebook, biases, mem_len=mem_len, block_len=block_len,
                       doc_ids=doc_ids)


def test_without_relative_bias():
  arrays, codebook, _ = make_inputs()
  check_against_oracle(arrays, codebook, {}, mem_len=4, block_len=6)


@pytest.mark.parametrize("cuts", [(12,), (1, 2, 3), (5, 6, 19), tuple(range(1, T))])
def test_whole_equals_pieces_with_state(cuts):
  arrays, codebook, biases = make_inputs()
  whole = tvq.vq_attention(**arrays, codebook=codebook, state=cold_state(), block_len=8, **biases)
  state, pieces = cold_state(), []
  for start, stop in zip((0, *cuts), (*cuts, T)):
    out = tvq.vq_attention(**part(arrays, start, stop), codebook=codebook, state=state,
                           block_len=3, **biases)
    state = out.state
    pieces.append(out.values)
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole.values, atol=1e-5)
  for name, got, want in zip(state._fields, state, whole.state):
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


def test_state_counts_every_token_once():
  arrays, codebook, biases = make_inputs()
  state = tvq.vq_attention(**arrays, codebook=codebook, state=cold_state(), block_len=5,
                           **biases).state
  np.testing.assert_array_equal(state.cache_counts.sum(-1), np.full((B, 1), T - 4))
  assert (state.memory_codes < S).all()
  np.testing.assert_array_equal(state.position, [T, T])


def test_rows_of_different_length_equal_rows_alone():
  arrays, codebook, biases = make_inputs()
  warm = tvq.vq_attention(**part(arrays, 0, 7), codebook=codebook, state=cold_state(), **biases).state
  for lengths in ([24, 9], [1, 0], [3, 17]):
    both = tvq.vq_attention(**arrays, codebook=codebook, state=warm, block_len=5,
                            lengths=jnp.array(lengths), **biases)
    for row, length in enumerate(lengths):
      one = lambda tree, r=row: jax.tree.map(lambda x: x[r : r + 1], tree)
      state = one(warm)
      if length:
        alone = tvq.vq_attention(**part(one(arrays), 0, length), codebook=codebook, state=state,
                                 block_len=5, **biases)
        np.testing.assert_allclose(both.values[row, :length], alone.values[0], atol=1e-5)
        state = alone.state
      for name, got, want in zip(state._fields, one(both.state), state):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


def test_grad_thru_cache_false_stops_gradients_at_the_block():
  arrays, codebook, biases = make_inputs()

  def last_block(v, grad_thru_cache):
    out = tvq.vq_attention(**{**arrays, "v": v}, codebook=codebook, state=cold_state(),
                           block_len=8, grad_thru_cache=grad_thru_cache, **biases)
    return jnp.sum(out.values[:, -1])

  gradient = jax.grad(last_block)(arrays["v"], False)
  assert float(jnp.abs(gradient[:, :16]).max()) == 0.0
  assert float(jnp.abs(gradient[:, 16:]).min()) > 0.0
  assert float(jnp.abs(jax.grad(last_block)(arrays["v"], True)[:, :16]).max()) > 0.0


def test_counts_stay_exact_in_bfloat16():
  """bfloat16 cannot count past 256: counts and means must not be kept in it."""
  n = 600
  arrays = jax.tree.map(lambda x: jnp.repeat(x[:, :1], n, axis=1).astype(jnp.bfloat16),
                        make_inputs()[0])
  _, codebook, biases = make_inputs()
  state = tvq.initial_attention_state(batch_size=B, n_kv_head=1, n_code=S, mem_len=4, d_k=K,
                                      d_v=V, dtype=jnp.bfloat16)

  @jax.jit
  def read(state, arrays):
    step = lambda state, x: (tvq.vq_attention(**x, codebook=codebook, state=state, **biases).state, None)
    return jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], arrays))[0]

  state = read(state, arrays)
  np.testing.assert_array_equal(state.cache_counts.max(-1), np.full((B, 1), n - 4.0))
  mean = jnp.take_along_axis(state.cache_means, state.cache_counts.argmax(-1)[..., None, None], axis=2)
  np.testing.assert_allclose(mean[:, 0, 0], arrays["v"][:, 0, 0].astype(jnp.float32), rtol=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(v=jnp.zeros((B, T - 1, 1, V))), "shape"),
    (dict(k=jnp.zeros((B, T, 1, K + 1))), "shape"),
    (dict(relative_keys=jnp.zeros((4, 1, K))), "4"),
    (dict(content_bias=jnp.zeros((K, 1))), "shape"),
    (dict(doc_ids=jnp.zeros((B, 1), jnp.int32)), "shape"),
    (dict(block_len=0), "block_len=0"),
    (dict(codebook=jnp.zeros((2, S, K))), "2 key/value heads"),
])
def test_shapes_that_do_not_fit_are_named(change, message):
  arrays, codebook, biases = make_inputs()
  settings = dict(**arrays, codebook=codebook, state=cold_state(), **biases)
  with pytest.raises((AssertionError, ValueError), match=message):
    tvq.vq_attention(**{**settings, **change})
