"""`vq_attention` equals the quadratic reference, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq

from attention_helpers import (
  ALL_BLOCKS_AT_ONCE,
  DIVISORS,
  DOCUMENTS,
  REDUCTIONS,
  SHORT,
  T,
  check_against_reference,
  cold_state,
  make_inputs,
  vq_attention,
)


@pytest.mark.parametrize("mem_len", DIVISORS)
@pytest.mark.parametrize("block_len", DIVISORS)
def test_scan_equals_the_reference(block_len, mem_len):
  arrays, codebook, biases = make_inputs(length=SHORT, mem_len=mem_len)
  check_against_reference(arrays, codebook, biases, mem_len=mem_len, block_len=block_len)


@pytest.mark.slow
@pytest.mark.parametrize("block_len, mem_len", [(1, 1), (4, 1), (4, 4), (6, 4), (1, 12), (6, 12)])
@pytest.mark.parametrize("reduction", ALL_BLOCKS_AT_ONCE)
def test_reductions_of_all_blocks_at_once_equal_the_reference(reduction, block_len, mem_len):
  """Includes documents, padding, and two query heads that share a key/value head."""
  arrays, codebook, biases = make_inputs(heads=2, length=SHORT, mem_len=mem_len)
  check_against_reference(
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
def test_any_length_equals_the_reference(reduction, length, block_len, mem_len):
  arrays, codebook, biases = make_inputs(length=length, mem_len=mem_len)
  check_against_reference(
    arrays, codebook, biases, mem_len=mem_len, block_len=block_len, reduction=reduction
  )


@pytest.mark.slow
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("reduction", ["scan", "assoc_scan"])
def test_several_heads_equal_the_reference(reduction, heads, kv_heads):
  arrays, codebook, biases = make_inputs(heads=heads, kv_heads=kv_heads)
  check_against_reference(arrays, codebook, biases, mem_len=4, block_len=6, reduction=reduction)


@pytest.mark.parametrize(
  "reduction, block_len", [("scan", 1), ("scan", 6), ("serial", 24), ("matmul", 4)]
)
def test_attention_without_cache_equals_the_reference(reduction, block_len):
  arrays, codebook, biases = make_inputs()
  check_against_reference(
    arrays, codebook, biases, mem_len=4, block_len=block_len, agg_cache=False, reduction=reduction
  )


@pytest.mark.slow
@pytest.mark.parametrize("block_len, mem_len", [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_documents_equal_the_reference(reduction, block_len, mem_len):
  arrays, codebook, biases = make_inputs(mem_len=mem_len)
  check_against_reference(
    arrays,
    codebook,
    biases,
    mem_len=mem_len,
    block_len=block_len,
    segment_ids=DOCUMENTS,
    reduction=reduction,
  )


@pytest.mark.slow
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
def test_encoder_equals_the_reference(reduction, block_len, mem_len, settings):
  arrays, codebook, biases = make_inputs(heads=2, mem_len=mem_len, is_causal=False)
  check_against_reference(
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


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["scan", "serial"])
@pytest.mark.parametrize("length", [24, 22])  # 11: a remainder in the two-level scan
def test_remat_changes_neither_values_nor_gradients(reduction, length):
  arrays, codebook, biases = make_inputs(length=length)
  check_against_reference(
    arrays, codebook, biases, mem_len=4, block_len=2, reduction=reduction, remat=True
  )


@pytest.mark.parametrize(
  "settings",
  [
    dict(reduction="scan"),
    dict(reduction="scan", remat=True, grad_thru_cache=False),
    dict(reduction="matmul", segment_ids=DOCUMENTS),
    dict(reduction="serial", remat=True, agg_cache=False),
    dict(reduction="assoc_scan", is_causal=False),
  ],
)
def test_forward_mode_agrees_with_reverse_mode(settings):
  is_causal = settings.get("is_causal", True)
  arrays, codebook, biases = make_inputs(heads=2, is_causal=is_causal)
  tangents = make_inputs(heads=2, is_causal=is_causal, seed=1)
  primals, tangents = (arrays, biases), (tangents[0], tangents[2])

  def values(arrays, biases):
    return tvq.vq_attention(
      **arrays, codebook=codebook, mem_len=4, block_len=5, **biases, **settings
    ).values

  @jax.jit
  def both_modes(primals, tangents):
    weight = jnp.cos(jnp.arange(T))[:, None, None]
    _, tangent = jax.jvp(values, primals, tangents)
    gradients = jax.grad(lambda *x: jnp.sum(weight * values(*x)), argnums=(0, 1))(*primals)
    products = jax.tree.map(lambda g, t: jnp.sum(g * t), gradients, tangents)
    return jnp.sum(weight * tangent), jax.tree.reduce(jnp.add, products)

  np.testing.assert_allclose(*both_modes(primals, tangents), rtol=1e-4)


def test_attention_without_relative_bias_equals_the_reference():
  arrays, codebook, _ = make_inputs()
  check_against_reference(arrays, codebook, {}, mem_len=4, block_len=6)


def test_a_memory_of_very_many_blocks_equals_the_reference():
  arrays, codebook, biases = make_inputs(length=SHORT, mem_len=40)
  check_against_reference(arrays, codebook, biases, mem_len=40, block_len=1, reduction="matmul")


def test_lengths_out_of_range_are_clipped():
  arrays, codebook, biases = make_inputs()
  settings = dict(codebook=codebook, mem_len=4, **biases)
  got, want = (vq_attention(**arrays, lengths=jnp.array(n), **settings) for n in ([-3, 99], [0, T]))
  jax.tree.map(np.testing.assert_array_equal, got.state, want.state)


def test_auto_equals_scan():
  arrays, codebook, biases = make_inputs()
  auto, scan = (
    vq_attention(
      **arrays, codebook=codebook, mem_len=4, block_len=3, reduction=reduction, **biases
    ).values
    for reduction in ("auto", "scan")
  )
  np.testing.assert_allclose(auto, scan, atol=1e-5)
