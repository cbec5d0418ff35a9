"""The algorithm against the quadratic oracle, and its own symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq


B, T, K, V, S = 2, 24, 4, 6, 5
SHORT = 12
DIVISORS = [1, 2, 3, 4, 6, 12]
AT_ONCE = ["serial", "matmul", "assoc_scan"]
REDUCTIONS = ["scan", *AT_ONCE]
DOCUMENTS = jnp.array([[0] * 3 + [4] * 15 + [7] * 6, [2] * 20 + [3] + [5] * 3], jnp.int32)


def make_inputs(*, heads=1, kv_heads=1, length=T, mem_len=4, seed=0, n_code=S, is_causal=True):
  keys = jax.random.split(jax.random.key(seed), 7)
  normal = jax.random.normal
  arrays = dict(
    q=normal(keys[0], (B, length, heads, K)),
    k=normal(keys[1], (B, length, kv_heads, K)),
    v=normal(keys[2], (B, length, kv_heads, V)),
  )
  distances = mem_len + 1 if is_causal else 2 * mem_len + 1
  biases = dict(
    relative_keys=normal(keys[4], (distances, kv_heads, K)),
    content_bias=normal(keys[5], (heads, K)),
    position_bias=normal(keys[6], (heads, K)),
  )
  codebook = normal(keys[3], (kv_heads, n_code, K))
  return arrays, codebook, biases


vq_attention = jax.jit(
  tvq.vq_attention,
  static_argnames=(
    "mem_len",
    "block_len",
    "reduction",
    "is_causal",
    "scale",
    "agg_cache",
    "grad_thru_cache",
    "remat",
  ),
)


def cold_state(*, kv_heads=1, mem_len=4, n_code=S, batch=B):
  return tvq.initial_attention_state(
    batch_size=batch, n_kv_head=kv_heads, n_code=n_code, mem_len=mem_len, d_k=K, d_v=V
  )


def part(arrays, start, stop):
  return {name: x[:, start:stop] for name, x in arrays.items()}


def check_against_oracle(
  arrays, codebook, biases, *, mem_len, block_len, reduction="scan", remat=False, **settings
):
  """Values and gradients of `vq_attention` and the oracle, under a random projection."""
  weight = jax.random.normal(jax.random.key(9), (*arrays["q"].shape[:3], V))
  if "lengths" in settings:  # what padding gets does not matter
    weight *= (jnp.arange(weight.shape[1]) < settings["lengths"][:, None])[..., None, None]

  def ours(arrays, biases):
    out = tvq.vq_attention(
      **arrays,
      codebook=codebook,
      mem_len=mem_len,
      block_len=block_len,
      reduction=reduction,
      remat=remat,
      **biases,
      **settings,
    )
    return jnp.sum(weight * out.values), jnp.where(weight == 0.0, 0.0, out.values)

  def theirs(arrays, biases):
    values = tvq.reference.quadratic_attention(
      **arrays,
      codebook=codebook,
      mem_len=mem_len,
      block_len=min(block_len, weight.shape[1]),
      **biases,
      **settings,
    )
    return jnp.sum(weight * values), jnp.where(weight == 0.0, 0.0, values)

  (got, values), gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(
    arrays, biases
  )
  # Not jitted: its small operations are compiled once for all tests.
  (want, expected), expected_gradients = jax.value_and_grad(theirs, argnums=(0, 1), has_aux=True)(
    arrays, biases
  )
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


@pytest.mark.parametrize("block_len, mem_len", [(1, 1), (4, 1), (4, 4), (6, 4), (1, 12), (6, 12)])
@pytest.mark.parametrize("reduction", AT_ONCE)
def test_all_blocks_at_once_equal_quadratic_oracle(reduction, block_len, mem_len):
  """With documents and padding in the same rows, and heads that share keys."""
  arrays, codebook, biases = make_inputs(heads=2, length=SHORT, mem_len=mem_len)
  check_against_oracle(
    arrays,
    codebook,
    biases,
    mem_len=mem_len,
    block_len=block_len,
    reduction=reduction,
    segment_ids=DOCUMENTS[:, 8:20],
    lengths=jnp.array([12, 9]),
  )


@pytest.mark.parametrize(
  "length, block_len, mem_len", [(23, 5, 7), (7, 16, 3), (1, 4, 2), (17, 4, 40)]
)
@pytest.mark.parametrize("reduction", ["scan", "matmul"])
def test_equals_quadratic_oracle_at_any_length(reduction, length, block_len, mem_len):
  arrays, codebook, biases = make_inputs(length=length, mem_len=mem_len)
  check_against_oracle(
    arrays, codebook, biases, mem_len=mem_len, block_len=block_len, reduction=reduction
  )


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("reduction", ["scan", "assoc_scan"])
def test_equals_quadratic_oracle_with_heads(reduction, heads, kv_heads):
  arrays, codebook, biases = make_inputs(heads=heads, kv_heads=kv_heads)
  check_against_oracle(arrays, codebook, biases, mem_len=4, block_len=6, reduction=reduction)


@pytest.mark.parametrize(
  "reduction, block_len", [("scan", 1), ("scan", 6), ("serial", 24), ("matmul", 4)]
)
def test_equals_quadratic_oracle_without_cache(reduction, block_len):
  arrays, codebook, biases = make_inputs()
  check_against_oracle(
    arrays, codebook, biases, mem_len=4, block_len=block_len, agg_cache=False, reduction=reduction
  )


@pytest.mark.parametrize("block_len, mem_len", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_quadratic_oracle_with_documents(reduction, block_len, mem_len):
  arrays, codebook, biases = make_inputs(mem_len=mem_len)
  check_against_oracle(
    arrays,
    codebook,
    biases,
    mem_len=mem_len,
    block_len=block_len,
    segment_ids=DOCUMENTS,
    reduction=reduction,
  )


@pytest.mark.parametrize(
  "block_len, mem_len, settings",
  [
    (6, 2, {}),
    (2, 5, {}),
    (3, 4, dict(segment_ids=DOCUMENTS, lengths=jnp.array([21, 24]))),
    (4, 6, dict(agg_cache=False)),
    (30, 2, {}),
    (1, 1, dict(lengths=jnp.array([1, 24]))),
  ],
)
@pytest.mark.parametrize("reduction", ["scan", "matmul"])
def test_encoder_equals_quadratic_oracle(reduction, block_len, mem_len, settings):
  arrays, codebook, biases = make_inputs(heads=2, mem_len=mem_len, is_causal=False)
  check_against_oracle(
    arrays,
    codebook,
    biases,
    mem_len=mem_len,
    block_len=block_len,
    is_causal=False,
    reduction=reduction,
    **settings,
  )


def test_encoder_takes_no_state():
  arrays, codebook, _ = make_inputs()
  with pytest.raises(ValueError, match="takes no state"):
    tvq.vq_attention(**arrays, codebook=codebook, state=cold_state(), is_causal=False)
  assert vq_attention(**arrays, codebook=codebook, is_causal=False).state is None


@pytest.mark.parametrize("reduction", ["scan", "serial"])
@pytest.mark.parametrize("length", [24, 22])  # 12 and 11 blocks: two levels of the scan, and a rest
def test_remat_changes_nothing(reduction, length):
  arrays, codebook, biases = make_inputs(length=length)
  check_against_oracle(
    arrays, codebook, biases, mem_len=4, block_len=2, reduction=reduction, remat=True
  )


def test_without_relative_bias():
  arrays, codebook, _ = make_inputs()
  check_against_oracle(arrays, codebook, {}, mem_len=4, block_len=6)


def test_memory_of_very_many_blocks():
  arrays, codebook, biases = make_inputs(length=SHORT, mem_len=40)
  check_against_oracle(arrays, codebook, biases, mem_len=40, block_len=1, reduction="matmul")


def test_padding_that_leads_nowhere_is_no_number():
  """Lengths beyond the row are those of the row."""
  arrays, codebook, biases = make_inputs()
  settings = dict(codebook=codebook, mem_len=4, **biases)
  got, want = (vq_attention(**arrays, lengths=jnp.array(n), **settings) for n in ([-3, 99], [0, T]))
  jax.tree.map(np.testing.assert_array_equal, got.state, want.state)


def test_auto_is_one_of_the_reductions():
  arrays, codebook, biases = make_inputs()
  auto, scan = (
    vq_attention(
      **arrays, codebook=codebook, mem_len=4, block_len=3, reduction=reduction, **biases
    ).values
    for reduction in ("auto", "scan")
  )
  np.testing.assert_allclose(auto, scan, atol=1e-5)


@pytest.mark.parametrize(
  "reduction, cuts",
  [("scan", (12,)), ("scan", tuple(range(1, T))), *((name, (5, 6, 16)) for name in REDUCTIONS)],
)
def test_whole_equals_pieces_with_state(reduction, cuts):
  arrays, codebook, biases = make_inputs()
  arrays |= dict(segment_ids=DOCUMENTS)
  whole = vq_attention(
    **arrays, codebook=codebook, state=cold_state(), block_len=8, reduction="scan", **biases
  )
  state, pieces = cold_state(), []
  for start, stop in zip((0, *cuts), (*cuts, T)):
    out = vq_attention(
      **part(arrays, start, stop),
      codebook=codebook,
      state=state,
      block_len=3,
      reduction=reduction,
      **biases,
    )
    state = out.state
    pieces.append(out.values)
  np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole.values, atol=1e-5)
  for name, got, want in zip(state._fields, state, whole.state):
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_pass_through_the_state(reduction):
  """The second half's gradient reaches values of the first half, as it does in one call."""
  arrays, codebook, biases = make_inputs()
  weight = jax.random.normal(jax.random.key(9), (B, T // 2, 1, V))

  def in_two_calls(v):
    halves = {**arrays, "v": v}
    state = vq_attention(
      **part(halves, 0, 12),
      codebook=codebook,
      state=cold_state(),
      block_len=4,
      reduction=reduction,
      **biases,
    ).state
    return jnp.sum(
      weight
      * vq_attention(
        **part(halves, 12, T),
        codebook=codebook,
        state=state,
        block_len=4,
        reduction=reduction,
        **biases,
      ).values
    )

  def in_one_call(v):
    return jnp.sum(
      weight
      * tvq.reference.quadratic_attention(
        **{**arrays, "v": v}, codebook=codebook, mem_len=4, **biases
      )[:, 12:]
    )

  got, want = jax.grad(in_two_calls)(arrays["v"]), jax.grad(in_one_call)(arrays["v"])
  assert float(jnp.abs(want[:, :8]).max()) > 0.0
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_masked_tokens_anywhere_change_nothing(is_causal):
  arrays, codebook, biases = make_inputs(is_causal=is_causal)
  mask = np.ones((B, T), bool)
  mask[0, :5] = mask[0, 20:] = mask[1, ::3] = False
  settings = dict(codebook=codebook, mem_len=4, block_len=5, is_causal=is_causal, **biases)
  out = vq_attention(**arrays, segment_ids=DOCUMENTS, mask=jnp.asarray(mask), **settings)
  for row in range(B):
    kept = {
      name: x[row : row + 1, mask[row]]
      for name, x in (arrays | dict(segment_ids=DOCUMENTS)).items()
    }
    alone = vq_attention(**kept, **settings)
    np.testing.assert_allclose(out.values[row, mask[row]], alone.values[0], atol=1e-5)
    np.testing.assert_array_equal(out.codes[row, mask[row]], alone.codes[0])
    for name in tvq.AttentionState._fields if is_causal else ():
      np.testing.assert_allclose(
        getattr(out.state, name)[row], getattr(alone.state, name)[0], atol=1e-5, err_msg=name
      )


def test_scale_is_that_of_all_scores():
  arrays, codebook, biases = make_inputs()
  plain = vq_attention(**arrays, codebook=codebook, mem_len=4, **biases).values
  scaled = jax.tree.map(lambda x: x / 2.0, ({"q": arrays["q"]}, biases))
  halves = {name: x if name == "relative_keys" else scaled[1][name] for name, x in biases.items()}
  by_hand = vq_attention(
    **{**arrays, **scaled[0]}, codebook=codebook, mem_len=4, scale=1.0, **halves
  )
  np.testing.assert_allclose(plain, by_hand.values, atol=1e-5)  # K^(-1/2) is a half


def test_state_counts_every_token_once():
  arrays, codebook, biases = make_inputs()
  state = vq_attention(**arrays, codebook=codebook, state=cold_state(), block_len=5, **biases).state
  np.testing.assert_array_equal(state.cache_counts.sum(-1), np.full((B, 1), T - 4))
  assert (state.memory_codes < S).all()
  np.testing.assert_array_equal(state.position, [T, T])


def test_rows_of_different_length_equal_rows_alone():
  arrays, codebook, biases = make_inputs()
  warm = vq_attention(**part(arrays, 0, 7), codebook=codebook, state=cold_state(), **biases).state
  for lengths in ([24, 9], [3, 0]):
    both = vq_attention(
      **arrays, codebook=codebook, state=warm, block_len=5, lengths=jnp.array(lengths), **biases
    )
    for row, length in enumerate(lengths):
      one = lambda tree, r=row: jax.tree.map(lambda x: x[r : r + 1], tree)
      state = one(warm)
      if length:
        alone = vq_attention(
          **part(one(arrays), 0, length), codebook=codebook, state=state, block_len=5, **biases
        )
        np.testing.assert_allclose(both.values[row, :length], alone.values[0], atol=1e-5)
        state = alone.state
      for name, got, want in zip(state._fields, one(both.state), state):
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


def test_grad_thru_cache_false_stops_gradients_at_the_block():
  arrays, codebook, biases = make_inputs()

  def last_block(v, grad_thru_cache):
    out = vq_attention(
      **{**arrays, "v": v},
      codebook=codebook,
      state=cold_state(),
      block_len=8,
      grad_thru_cache=grad_thru_cache,
      **biases,
    )
    return jnp.sum(out.values[:, -1])

  gradient = jax.grad(last_block)(arrays["v"], False)
  assert float(jnp.abs(gradient[:, :16]).max()) == 0.0
  assert float(jnp.abs(gradient[:, 16:]).min()) > 0.0
  assert float(jnp.abs(jax.grad(last_block)(arrays["v"], True)[:, :16]).max()) > 0.0


def test_counts_stay_exact_in_bfloat16():
  """bfloat16 cannot count past 256: counts and means must not be kept in it."""
  n = 600
  arrays = jax.tree.map(
    lambda x: jnp.repeat(x[:, :1], n, axis=1).astype(jnp.bfloat16), make_inputs()[0]
  )
  _, codebook, biases = make_inputs()
  state = tvq.initial_attention_state(
    batch_size=B, n_kv_head=1, n_code=S, mem_len=4, d_k=K, d_v=V, dtype=jnp.bfloat16
  )

  @jax.jit
  def read(state, arrays):
    step = lambda state, x: (
      vq_attention(**x, codebook=codebook, state=state, **biases).state,
      None,
    )
    return jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1)[:, :, None], arrays))[
      0
    ]

  state = read(state, arrays)
  np.testing.assert_array_equal(state.cache_counts.max(-1), np.full((B, 1), n - 4.0))
  mean = jnp.take_along_axis(
    state.cache_means, state.cache_counts.argmax(-1)[..., None, None], axis=2
  )
  np.testing.assert_allclose(mean[:, 0, 0], arrays["v"][:, 0, 0].astype(jnp.float32), rtol=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(v=jnp.zeros((B, T - 1, 1, V))), "shape"),
    (dict(k=jnp.zeros((B, T, 1, K + 1))), "shape"),
    (dict(relative_keys=jnp.zeros((4, 1, K))), "4"),
    (dict(relative_keys=jnp.zeros((5, 2, K))), "2"),
    (dict(mem_len=7), "mem_len=7, but the state has M=4"),
    (dict(reduction="sum"), "reduction='sum' must be one of"),
    (dict(mask=jnp.ones((B, T), bool), lengths=jnp.array([1, 1])), "a mask or lengths"),
    (dict(mask=jnp.ones((B, 1), bool)), "shape"),
    (dict(content_bias=jnp.zeros((K, 1))), "shape"),
    (dict(segment_ids=jnp.zeros((B, 1), jnp.int32)), "shape"),
    (dict(block_len=0), "block_len=0"),
    (dict(state=None, mem_len=-1), "mem_len=-1 must be an integer"),
    (dict(state=(1, 2)), "state must be an AttentionState, got tuple"),
    (
      dict(state=cold_state(batch=3)),
      r"state.memory_keys must have shape \[B=2, G=1, M=4, K=4\], got \(3, 1, 4, 4\)",
    ),
    (dict(codebook=jnp.zeros((S, K))), r"codebook must have shape \[G=1, S, K=4\], got \(5, 4\)"),
    (dict(q=jnp.zeros((B, T, 1, K), jnp.int32)), "q must be floating, got int32"),
    (dict(lengths=[3]), r"lengths must have shape \[B=2\], got \(1,\)"),
    (dict(lengths=[3.0, 4.0]), "lengths must be integer, got float"),
    (dict(mask=jnp.ones((B, T))), "mask must be bool, got float32"),
    (dict(segment_ids=jnp.zeros((B, T))), "segment_ids must be integer, got float32"),
    (
      dict(codebook=jnp.zeros((2, S, K))),
      r"codebook must have shape \[G=1, S, K=4\], got \(2, 5, 4\)",
    ),
    (
      dict(
        q=jnp.zeros((B, T, 3, K)),
        k=jnp.zeros((B, T, 2, K)),
        v=jnp.zeros((B, T, 2, V)),
        codebook=jnp.zeros((2, S, K)),
        content_bias=None,
        position_bias=None,
      ),
      "3 query heads cannot share 2 key/value heads evenly",
    ),
  ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
  arrays, codebook, biases = make_inputs()
  settings = dict(**arrays, codebook=codebook, state=cold_state(), **biases)
  with pytest.raises((TypeError, ValueError), match=message):
    tvq.vq_attention(**{**settings, **change})
