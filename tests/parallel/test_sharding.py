"""Meshes, the table of shardings, and the shares of processes."""

import re
import types

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.parallel import sharding
from tvq_haiku.training import train_step as train_step_lib

import helpers

pytestmark = pytest.mark.slow

CONFIG = helpers.tiny(n_layer=1)
TRAIN = tvq.TrainConfig(sequence_len=128, update_len=64, global_batch_size=8)
MHA = CONFIG.replace(head_type="mha", n_head=2, d_v=8)


@pytest.mark.parametrize(
  "text, message",
  [
    (
      "data:16",
      "mesh='data:16' needs 16 devices, but only 8 are available. JAX_NUM_CPU_DEVICES=16",
    ),
    ("data", r"'data' must be AXIS:SIZE"),
    ("rows:2", r"'rows:2' must be AXIS:SIZE, where AXIS is one of data, fsdp, model, sequence"),
    ("data:2,data:2", "each at most once"),
    ("data:0", "SIZE is a positive integer"),
    ("data:²", "SIZE is a positive integer"),
    ("", "'' must be AXIS:SIZE"),
  ],
)
def test_wrong_meshes_are_rejected(text, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(text)


def test_a_mesh_uses_the_first_devices():
  mesh = sharding.make_mesh("data:2,model:2")
  assert dict(mesh.shape) == {"data": 2, "model": 2}
  assert mesh.devices.flatten().tolist() == jax.devices()[:4]


def test_several_processes_must_use_all_devices(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="mesh='data:4' uses 4 of 8 devices"):
    sharding.make_mesh("data:4")
  assert sharding.make_mesh("data:8").size == 8


def test_the_mesh_in_use_is_known_only_inside_of_use_mesh():
  mesh = sharding.make_mesh("data:2,sequence:2,model:2")
  assert sharding.axis_sizes() == {} and sharding.per_device(10) == 10
  with sharding.use_mesh(mesh):
    assert dict(sharding.axis_sizes()) == {"data": 2, "sequence": 2, "model": 2}
    assert sharding.per_device(10) == 3  # 10 / (2·2), rounded up; model does not split tokens
  with sharding.use_mesh(None):
    assert sharding.axis_sizes() == {}


@pytest.mark.parametrize(
  "axes, shape, sizes, want",
  [
    (
      (("data", "fsdp"), "model"),
      (8, 6),
      dict(data=2, fsdp=2, model=3),
      (("data", "fsdp"), "model"),
    ),
    ((("data", "fsdp"),), (6, 5), dict(data=2, fsdp=2), ("data", None)),  # 4 does not divide 6
    ((("data", "fsdp"),), (3, 5), dict(data=2, fsdp=2), (None, None)),
    (("model", None), (4, 4), dict(data=2), (None, None)),  # the mesh has no such axis
    ((), (4, 4), dict(data=2), (None, None)),
  ],
)
def test_axes_that_do_not_fit_are_dropped(axes, shape, sizes, want):
  assert tuple(sharding.fit_spec(axes, shape, sizes)) == want


def test_more_axes_than_dimensions_are_rejected():
  with pytest.raises(ValueError):
    sharding.fit_spec(("data", "model"), (4,), {"data": 2})


def test_every_kernel_has_a_rule_and_every_rule_a_parameter():
  shapes = {
    f"{module}/{name}": leaf.shape
    for config in (CONFIG, MHA, CONFIG.replace(e_tie=True))
    for module, leaves in tvq.params_shapes(config).items()
    for name, leaf in leaves.items()
  }
  for path, shape in shapes.items():
    pattern, axes = next(rule for rule in sharding.PARAM_RULES if re.search(rule[0], path))
    assert (pattern == "") == (not path.endswith(("kernel", "embeddings"))), path
    assert len(axes) in (0, len(shape) - ("/layers/" in path)), path
  for pattern, _ in sharding.PARAM_RULES:
    assert any(re.search(pattern, path) for path in shapes), pattern


def test_every_field_of_a_state_has_a_rule():
  fields = {
    path[-1].name: leaf.ndim - ("attention" in path[0].name)
    for config in (CONFIG, CONFIG.replace(attn_type="full", mem_len=64))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tvq.initial_state(config, 2))
  }
  assert fields == {name: len(axes) for name, axes in sharding.STATE_RULES.items()}


def test_the_model_axis_splits_heads_or_the_value_width():
  mesh = sharding.make_mesh("data:4,model:2")
  shapes = jax.eval_shape(lambda: tvq.initial_state(CONFIG, 8))  # 1 head
  state = sharding.state_shardings(shapes, mesh, CONFIG.kv_heads)
  assert state.attention_1.cache_means.spec == P(None, "data", None, None, "model")
  assert state.document.spec == P("data")
  shapes = jax.eval_shape(lambda: tvq.initial_state(MHA, 8))  # 2 heads
  state = sharding.state_shardings(shapes, mesh, MHA.kv_heads)
  assert state.attention_1.cache_means.spec == P(None, "data", "model", None, None)
  assert state.attention_1.memory_keys.spec == P(None, "data", "model", None, None)


def test_optimizer_state_is_sharded_like_its_parameter():
  mesh = sharding.make_mesh("fsdp:4,model:2")
  shapes = train_step_lib.train_state_shapes(CONFIG, TRAIN)
  shardings = sharding.train_state_shardings(shapes, mesh)
  name = "transformer/layers/attention_1/out"
  want = shardings.params[name]["kernel"].spec
  assert want == P(None, "model", "fsdp")
  moments = [
    s.spec
    for path, s in jax.tree_util.tree_leaves_with_path(shardings.opt_state)
    if name in jax.tree_util.keystr(path)
  ]
  assert moments == [want, want]
  assert shardings.step.spec == P()


def test_train_state_is_created_sharded():
  config = tvq.TransformerConfig.tiny(n_layer=1, d_model=64, n_vocab=256)
  state = tvq.init_train_state(config, TRAIN, jax.random.key(0), mesh=sharding.make_mesh("fsdp:8"))
  per_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
  total = sum(x.nbytes for x in jax.tree.leaves(state))
  assert per_device < 0.2 * total  # vectors and codebooks are replicated


@pytest.mark.parametrize("width", [(), (5,)])  # tokens [B, T] and features [B, T, D]
def test_a_batch_is_put_on_the_devices_of_its_elements(width):
  mesh = sharding.make_mesh("data:2,fsdp:2,sequence:2")
  shape = (8, 3, *width)
  batch = {"inputs": np.arange(np.prod(shape)).reshape(shape)}
  x = sharding.put_batch(batch, mesh, 8)["inputs"]
  np.testing.assert_array_equal(x, batch["inputs"])
  assert x.sharding.spec == P(("data", "fsdp"), None)
  for shard in x.addressable_shards:
    assert shard.data.shape == (2, 3, *width)
    np.testing.assert_array_equal(shard.data, batch["inputs"][shard.index])


def test_a_process_may_pass_only_its_share_of_a_batch(monkeypatch):
  """Process 1 of 2, which has the devices of batch elements 4 to 8."""
  mesh = sharding.make_mesh("data:4")
  batch = np.arange(24).reshape(8, 3)
  monkeypatch.setattr(sharding, "process_share", lambda mesh, batch_size: (1, 2))
  read = {}

  def make_array(shape, sharding, callback):
    for start in (4, 6):
      read[start] = callback((slice(start, start + 2), slice(None)))
    return shape

  monkeypatch.setattr(jax, "make_array_from_callback", make_array)
  assert sharding.put_batch({"inputs": batch[4:]}, mesh, 8) == {"inputs": (8, 3)}
  np.testing.assert_array_equal(read[4], batch[4:6])
  np.testing.assert_array_equal(read[6], batch[6:8])


def test_a_single_process_has_the_complete_batch():
  assert sharding.process_share(None, 8) == (0, 1)
  assert sharding.process_share(sharding.make_mesh("data:4,model:2"), 8) == (0, 1)


@pytest.mark.parametrize("first, want", [(0, (0, 2)), (4, (1, 2)), (2, None)])
def test_a_process_has_the_batch_elements_of_its_devices(monkeypatch, first, want):
  indices = {i: (slice(first + 2 * i, first + 2 * i + 2), slice(None)) for i in range(2)}
  fake = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: indices)
  monkeypatch.setattr(sharding, "batch_sharding", lambda mesh, batch_size: fake)
  mesh = sharding.make_mesh("data:4,model:2")
  if want:
    assert sharding.process_share(mesh, 8) == want
  else:
    with pytest.raises(ValueError, match="assigns batch elements 2 to 6 of 8 to this process"):
      sharding.process_share(mesh, 8)
