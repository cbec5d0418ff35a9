"""`vq_attention` from call to call: state, padding, gradients, counts; and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq

from attention_helpers import (
  DOCUMENTS,
  REDUCTIONS,
  B,
  K,
  S,
  T,
  V,
  cold_state,
  make_inputs,
  tokens_of,
  vq_attention,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
  "reduction, cuts",
  [("scan", (12,)), ("scan", tuple(range(1, T))), *((name, (5, 6, 16)) for name in REDUCTIONS)],
)
def test_one_call_equals_several_calls_with_state(reduction, cuts):
  arrays, codebook, biases = make_inputs()
  arrays |= dict(segment_ids=DOCUMENTS)
  one_call = vq_attention(
    **arrays, codebook=codebook, state=cold_state(), block_len=8, reduction="scan", **biases
  )
  state, several_calls = cold_state(), []
  for start, stop in zip((0, *cuts), (*cuts, T), strict=True):
    out = vq_attention(
      **tokens_of(arrays, start, stop),
      codebook=codebook,
      state=state,
      block_len=3,
      reduction=reduction,
      **biases,
    )
    state = out.state
    several_calls.append(out.values)
  np.testing.assert_allclose(jnp.concatenate(several_calls, axis=1), one_call.values, atol=1e-5)
  for name, got, want in zip(state._fields, state, one_call.state, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_pass_through_the_state(reduction):
  """The gradient of the second half reaches values of the first half, as in one call."""
  arrays, codebook, biases = make_inputs()
  weight = jax.random.normal(jax.random.key(9), (B, T // 2, 1, V))

  def in_two_calls(v):
    halves = {**arrays, "v": v}
    state = vq_attention(
      **tokens_of(halves, 0, 12),
      codebook=codebook,
      state=cold_state(),
      block_len=4,
      reduction=reduction,
      **biases,
    ).state
    return jnp.sum(
      weight
      * vq_attention(
        **tokens_of(halves, 12, T),
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
def test_padding_anywhere_changes_no_token(is_causal):
  arrays, codebook, biases = make_inputs(is_causal=is_causal)
  mask = np.ones((B, T), bool)
  mask[0, :5] = mask[0, 20:] = mask[1, ::3] = False
  settings = dict(codebook=codebook, mem_len=4, block_len=5, is_causal=is_causal, **biases)
  out = vq_attention(**arrays, segment_ids=DOCUMENTS, mask=jnp.asarray(mask), **settings)
  for b in range(B):
    kept = {
      name: x[b : b + 1, mask[b]] for name, x in (arrays | dict(segment_ids=DOCUMENTS)).items()
    }
    alone = vq_attention(**kept, **settings)
    np.testing.assert_allclose(out.values[b, mask[b]], alone.values[0], atol=1e-5)
    np.testing.assert_array_equal(out.codes[b, mask[b]], alone.codes[0])
    for name in tvq.AttentionState._fields if is_causal else ():
      np.testing.assert_allclose(
        getattr(out.state, name)[b], getattr(alone.state, name)[0], atol=1e-5, err_msg=name
      )


def test_scale_multiplies_all_scores():
  arrays, codebook, biases = make_inputs()
  plain = vq_attention(**arrays, codebook=codebook, mem_len=4, **biases).values
  scaled = jax.tree.map(lambda x: x / 2.0, ({"q": arrays["q"]}, biases))
  halves = {name: x if name == "relative_keys" else scaled[1][name] for name, x in biases.items()}
  by_hand = vq_attention(
    **{**arrays, **scaled[0]}, codebook=codebook, mem_len=4, scale=1.0, **halves
  )
  np.testing.assert_allclose(plain, by_hand.values, atol=1e-5)  # K^(-1/2) is a half


def test_the_state_counts_each_token_once():
  arrays, codebook, biases = make_inputs()
  state = vq_attention(**arrays, codebook=codebook, state=cold_state(), block_len=5, **biases).state
  np.testing.assert_array_equal(state.cache_counts.sum(-1), np.full((B, 1), T - 4))
  assert ((0 <= state.memory_codes) & (state.memory_codes < S)).all()
  np.testing.assert_array_equal(state.position, [T, T])


def test_batch_elements_of_different_lengths_equal_each_alone():
  arrays, codebook, biases = make_inputs()
  warm = vq_attention(
    **tokens_of(arrays, 0, 7), codebook=codebook, state=cold_state(), **biases
  ).state
  for lengths in ([24, 9], [3, 0]):
    both = vq_attention(
      **arrays, codebook=codebook, state=warm, block_len=5, lengths=jnp.array(lengths), **biases
    )
    for b, length in enumerate(lengths):
      element = lambda tree, b=b: jax.tree.map(lambda x: x[b : b + 1], tree)
      state = element(warm)
      if length:
        alone = vq_attention(
          **tokens_of(element(arrays), 0, length),
          codebook=codebook,
          state=state,
          block_len=5,
          **biases,
        )
        np.testing.assert_allclose(both.values[b, :length], alone.values[0], atol=1e-5)
        state = alone.state
      for name, got, want in zip(state._fields, element(both.state), state, strict=True):
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
  """In bfloat16, 256 + 1 = 256: counts and means must be float32."""
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
    (
      dict(k=jnp.zeros((B, T, 2, K)), q=jnp.zeros((B, T, 2, K)), v=jnp.zeros((B, T, 2, V))),
      r"codebook must have shape \[G=2, S, K=4\], got \(1, 5, 4\).*first axis for each head of k",
    ),
    (
      {name: jnp.zeros((B, 1, T, K)) for name in "qkv"},  # [B, heads, T, K]
      r"codebook must have shape \[G=24, S, K=4\].* Heads are the third axis of q, k and v",
    ),
    (dict(k=jnp.zeros((B, 1, T, K))), r"k must have .* got \(2, 1, 24, 4\).* third axis"),
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
def test_errors_name_the_argument_that_does_not_fit(change, message):
  arrays, codebook, biases = make_inputs()
  settings = dict(**arrays, codebook=codebook, state=cold_state(), **biases)
  with pytest.raises((TypeError, ValueError), match=message):
    tvq.vq_attention(**{**settings, **change})
