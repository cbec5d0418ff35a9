"""`full_attention` equals the quadratic reference without quantization, for tiles of any size."""

import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.attention import full, tiled
from tvq_haiku.attention import state as state_lib

B, T, H, G, K, V = 2, 13, 4, 2, 4, 6
DOCUMENTS = jnp.array([[0] * 4 + [1] * 9, [2] * 10 + [3] * 3], jnp.int32)
NAMES = ("q", "k", "v", "relative_keys", "content_bias", "position_bias")


def make_inputs(mem_len, is_causal):
  shapes = (
    (B, T, H, K),
    (B, T, G, K),
    (B, T, G, V),
    ((1 if is_causal else 2) * mem_len + 1, G, K),
    (H, K),
    (H, K),
  )
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return {
    name: jax.random.normal(key, shape)
    for name, key, shape in zip(NAMES, keys, shapes, strict=True)
  }


def cold_state(mem_len):
  return state_lib.initial_key_value_state(batch_size=B, n_kv_head=G, mem_len=mem_len, d_k=K, d_v=V)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("mem_len, block_len", [(13, 3), (13, 16), (5, 1), (3, 4), (20, 2)])
def test_full_attention_equals_the_reference(mem_len, block_len, is_causal):
  arrays = make_inputs(mem_len, is_causal)
  lengths = jnp.array([13, 8])
  weight = jax.random.normal(jax.random.key(9), (B, T, H, V))
  weight *= (jnp.arange(T) < lengths[:, None])[..., None, None]
  common = dict(is_causal=is_causal, segment_ids=DOCUMENTS, lengths=lengths, block_len=block_len)

  def ours(arrays):
    return jnp.sum(
      weight * full.full_attention(**arrays, state=cold_state(mem_len), **common).values
    )

  def reference(arrays):
    return jnp.sum(
      weight
      * tvq.reference.quadratic_attention(
        codebook=None, mem_len=mem_len, **arrays, **common | dict(block_len=T)
      )
    )

  got, want = (
    f(arrays) for f in (jax.jit(jax.value_and_grad(ours)), jax.value_and_grad(reference))
  )
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    assert float(jnp.abs(y).max()) > 0.0
    np.testing.assert_allclose(x, y, atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize("mem_len", [13, 5])
def test_one_call_equals_several_calls_with_state(mem_len):
  arrays = make_inputs(mem_len, True)
  biases = {name: arrays[name] for name in NAMES[3:]}
  attend = jax.jit(full.full_attention, static_argnames="block_len")
  one_call = attend(
    *(arrays[x] for x in "qkv"),
    state=cold_state(mem_len),
    segment_ids=DOCUMENTS,
    block_len=4,
    **biases,
  )
  state, several_calls = cold_state(mem_len), []
  for start, stop in ((0, 6), (6, 7), (7, 13)):
    out = attend(
      *(arrays[x][:, start:stop] for x in "qkv"),
      state=state,
      block_len=3,
      segment_ids=DOCUMENTS[:, start:stop],
      **biases,
    )
    state, several_calls = out.state, [*several_calls, out.values]
  np.testing.assert_allclose(jnp.concatenate(several_calls, axis=1), one_call.values, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, one_call.state)


def test_tiles_that_no_query_sees_are_skipped():
  """The tiles of the causal triangle are computed, whatever the length of the empty context."""
  layout = tiled.TileLayout(block_len=2, tile_len=4, mem_len=40, center=0)
  docs = jnp.where(jnp.arange(60) < 40, -1, jnp.where(jnp.arange(60) < 53, 0, -1))[None]
  ranges = [tuple(map(int, tiled.visible_tiles(layout, docs, jnp.asarray(r)))) for r in range(7)]
  assert ranges == [(10, 11), (10, 11), (10, 12), (10, 12), (10, 13), (10, 13), (10, 14)]
  # Tiles before the context are skipped too.
  layout, docs = layout._replace(mem_len=4), jnp.zeros((1, 60), jnp.int32)
  ranges = [
    tuple(map(int, tiled.visible_tiles(layout, docs, jnp.asarray(r)))) for r in (0, 2, 3, 9)
  ]
  assert ranges == [(0, 2), (1, 3), (1, 3), (4, 6)]


def test_no_array_holds_all_pairs_of_tokens():
  length = 512

  def loss(q):
    state = state_lib.initial_key_value_state(
      batch_size=1, n_kv_head=1, mem_len=length, d_k=4, d_v=4
    )
    return jnp.sum(full.full_attention(q, q, q, state=state, block_len=32).values)

  jaxpr = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, length, 1, 4))))
  assert "f32[1,1,1,32,64]" in jaxpr  # a tile
  assert "512,512" not in jaxpr and "512,1024" not in jaxpr


def test_errors_name_head_counts_that_do_not_fit():
  arrays = make_inputs(5, True)
  with pytest.raises(ValueError, match="4 query heads cannot share 3"):
    full.full_attention(
      arrays["q"],
      jnp.zeros((B, T, 3, K)),
      jnp.zeros((B, T, 3, V)),
      state=state_lib.initial_key_value_state(batch_size=B, n_kv_head=3, mem_len=5, d_k=K, d_v=V),
    )


def test_gradients_of_tiled_attention():
  arrays = make_inputs(5, True)
  check_grads(
    lambda arrays: full.full_attention(**arrays, state=cold_state(5), block_len=4).values,
    (arrays,),
    order=1,
    modes=["fwd", "rev"],
    atol=1e-2,
    rtol=1e-2,
  )
