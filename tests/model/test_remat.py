"""Rematerialization: the activations that are kept, their estimate, and unchanged gradients."""

import math

import jax
import jax.numpy as jnp
import pytest

import tvq_haiku as tvq
from tvq_haiku.model import remat as remat_lib

import helpers
from helpers import tiny

pytestmark = pytest.mark.slow

LENGTH = 2048


def saved_bytes(config, length=LENGTH):
  """Returns the bytes of activations that the backward pass of a training loss keeps."""

  def backward(params, tokens):
    def loss(params):
      batch = dict(inputs=tokens, targets=tokens)
      return tvq.training_loss(params, config, None, batch, tvq.initial_state(config, 1))[0]

    return jax.vjp(loss, params)[1]

  params = tvq.params_shapes(config)
  saved = jax.eval_shape(backward, params, jax.ShapeDtypeStruct((1, length), jnp.int32))
  return tree_bytes(saved) - tree_bytes(params)


def tree_bytes(tree):
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "settings",
  [
    dict(),
    dict(agg_cache=False),
    dict(precision="bfloat16"),
    dict(head_type="mha", n_head=4, d_v=64),
    dict(attn_type="full"),
  ],
)
def test_estimated_activation_bytes_are_near_the_bytes_that_autodiff_keeps(settings):
  config = tvq.TransformerConfig(n_vocab=16, remat="none", **settings)
  estimate = remat_lib.activation_bytes(config, LENGTH)
  assert 0.7 <= estimate / saved_bytes(config) <= 1.1


def test_each_remat_setting_keeps_the_activations_in_the_table():
  config = tvq.TransformerConfig(n_vocab=16, n_layer=3, reduction="serial")

  def bytes_per_token(remat):
    changed = config.replace(remat=remat)
    return (saved_bytes(changed, 2 * LENGTH) - saved_bytes(changed, LENGTH)) / LENGTH

  none, block, dots, layer = (bytes_per_token(name) for name in ("none", "block", "dots", "layer"))
  # `layer` keeps the inputs [T, D] of N layers; outside of the layers, two arrays [T, D].
  inputs = 4 * config.n_layer * config.d_model
  assert inputs <= layer <= inputs + 3 * 4 * config.d_model
  # `dots` also keeps what projections return: q, k, v, gate, and the output of the branch.
  projected = 2 * 4 * config.n_layer * (2 * config.d_k + 2 * config.d_v + config.d_model)
  assert inputs + projected <= dots < block
  # `block` does not keep the softmax weights of the 2·N attentions, each [T, M+L+S].
  weights = 2 * 4 * config.n_layer * (config.mem_len + config.block_len + config.n_code)
  assert block + weights <= none


def test_remat_does_not_change_gradients():
  tokens = jnp.asarray(helpers.random_tokens(tiny(), 2, 24))
  batch = dict(inputs=tokens, targets=tokens)

  def gradients(config):
    def loss(params):
      return tvq.training_loss(params, config, None, batch, tvq.initial_state(config, 2))[0]

    return jax.jit(jax.grad(loss))(helpers.random_params(config))

  expected = gradients(tiny(remat="none"))
  for remat in ("block", "dots", "layer"):
    helpers.assert_trees_close(gradients(tiny(remat=remat)), expected)


def test_auto_remat_compares_the_estimate_with_a_fraction_of_device_memory(monkeypatch):
  config = tvq.TransformerConfig(n_vocab=259)
  needed = remat_lib.activation_bytes(config, LENGTH)
  monkeypatch.setattr(remat_lib, "device_memory_bytes", lambda device: math.ceil(needed / 0.65))
  assert remat_lib.resolve_remat(config, LENGTH) == "none"
  assert remat_lib.resolve_remat(config, LENGTH + 1) == "layer"
  for remat in ("none", "block", "dots", "layer"):
    assert remat_lib.resolve_remat(config.replace(remat=remat), 10**9) == remat


def test_device_memory_is_what_the_device_reports_or_a_default():
  class Device:
    platform = "gpu"

    def __init__(self, stats):
      self._stats = stats

    def memory_stats(self):
      return self._stats

  assert remat_lib.device_memory_bytes(Device({"bytes_limit": 123})) == 123
  assert remat_lib.device_memory_bytes(Device(None)) == 16 * 2**30
  assert remat_lib.device_memory_bytes(jax.devices("cpu")[0]) > 2**28
