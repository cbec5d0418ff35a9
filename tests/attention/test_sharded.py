"""Attention on a mesh computes what one device does, and exchanges what does not grow with T."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.attention import sharded
from tvq_haiku.parallel import sharding

import helpers

pytestmark = pytest.mark.slow

BLOCK_LEN = 4


def make_inputs(T=64, lengths=None, documents=None):
  """Returns (q, k, v, codebook), keyword arguments, and gradients of the two outputs."""
  rng = np.random.default_rng(0)
  B, H, G, K, V, S, M = 2, 2, 2, 4, 6, 5, 7

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  before = tvq.vq_attention(
    normal(B, 20, H, K),
    normal(B, 20, G, K),
    normal(B, 20, G, V),
    normal(G, S, K),
    mem_len=M,
    block_len=BLOCK_LEN,
  )
  arrays = (normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, V), normal(G, S, K))
  others = dict(
    state=before.state,
    relative_keys=normal(M + 1, G, K),
    content_bias=normal(H, K),
    position_bias=normal(H, K),
    lengths=None if lengths is None else jnp.asarray(lengths),
  )
  if documents:
    docs = np.random.default_rng(1).integers(0, documents, (B, T))
    others["segment_ids"] = jnp.asarray(np.sort(docs, axis=1), jnp.int32)
  return arrays, others, (normal(B, T, H, V), normal(B, G, S, V))


def attend(arrays, others, mesh):
  with sharding.use_mesh(mesh):
    return sharded.sharded_attention(tvq.vq_attention, *arrays, **others, block_len=BLOCK_LEN)


@pytest.mark.parametrize(
  "mesh, T, lengths, documents",
  [
    ("sequence:8", 64, None, None),
    ("sequence:8", 64, (0, 43), None),
    ("sequence:8", 64, (50, 8), 3),
    ("data:2,sequence:2,model:2", 64, (50, 8), 3),
    ("sequence:8", 24, (20, 8), 3),
  ],
)
def test_values_state_and_gradients_equal_one_device(mesh, T, lengths, documents):
  arrays, others, (d_values, d_means) = make_inputs(T, lengths, documents)

  def compute(mesh, arrays, others):
    def loss(arrays, others):
      out = attend(arrays, others, mesh)
      is_token = jnp.arange(T) < (T if lengths is None else others["lengths"][:, None])
      values = jnp.where(jnp.broadcast_to(is_token, (2, T))[..., None, None], out.values, 0.0)
      total = jnp.sum(values * d_values) + jnp.sum(out.state.cache_means * d_means)
      return total, (values, out.state)

    if mesh is not None:
      arrays, others = jax.device_put((arrays, others), sharding.replicated(mesh))
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays, others)
    return jax.device_get((out, gradients))

  want, got = compute(None, arrays, others), compute(sharding.make_mesh(mesh), arrays, others)
  helpers.assert_trees_close(got[0], want[0])
  helpers.assert_trees_close(got[1], want[1], atol=5e-5)


def test_sequence_shards_are_not_gathered():
  arrays, others, _ = make_inputs()
  mesh = sharding.make_mesh("sequence:8")
  spec = jax.NamedSharding(mesh, P(None, "sequence"))
  arrays = tuple(jax.device_put(x, spec) for x in arrays[:3]) + arrays[3:]
  others = jax.device_put(others, sharding.replicated(mesh))
  function = jax.jit(lambda arrays, others: attend(arrays, others, mesh).values)
  program = function.lower(arrays, others).compile().as_text()
  assert "collective-permute" in program and "all-gather" not in program
