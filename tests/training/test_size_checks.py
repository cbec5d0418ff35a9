"""Sizes of a model, a batch and a mesh that are incompatible, and the messages about them."""

import jax
import pytest

import tvq_haiku as tvq
from tvq_haiku.parallel import sharding
from tvq_haiku.training import size_checks

import helpers

CONFIG = helpers.tiny(n_layer=1)
TRAIN = tvq.TrainConfig(sequence_len=128, update_len=64, global_batch_size=8)


@pytest.mark.parametrize(
  "mesh, model, training, message",
  [
    ("data:3", {}, {}, r"global_batch_size=8 must be a multiple of .* = 3·1"),
    ("data:2,fsdp:3", {}, {}, r"data·fsdp·n_accumulate = 6·1"),
    ("data:8", {}, dict(n_accumulate=2), r"data·fsdp·n_accumulate = 8·2"),
    ("model:3", {}, {}, "model=3 must divide the number of key/value heads, 1, or .* d_v=16"),
    ("sequence:8", dict(mem_len=3), dict(update_len=32), "update_len=32 must be a multiple of"),
    ("sequence:8", dict(block_len=4), dict(update_len=32), "32/8 = 4 must be at least mem_len=8"),
    ("sequence:8", dict(attn_type="full", mem_len=64), {}, "attn_type='full'. Use attn_type='vq'"),
    ("sequence:8", dict(attn_type=("vq", "full")), {}, "attn_type=.*'full'.*. Use attn_type='vq'"),
  ],
)
def test_incompatible_sizes_of_a_mesh_are_named(mesh, model, training, message):
  config, train_cfg = CONFIG.replace(**model), TRAIN.replace(**training)
  sizes = sharding.parse_mesh(mesh)
  with pytest.raises(ValueError, match=message) as error:
    tvq.make_train_step(config, train_cfg, mesh)
  assert str(error.value).startswith(f"mesh={sizes}: ")


def test_arguments_that_are_not_configurations_are_named():
  with pytest.raises(TypeError, match="make_train_step: train_cfg must be a TrainConfig, got dict"):
    tvq.make_train_step(CONFIG, {})
  with pytest.raises(TypeError, match="config must be a TransformerConfig, got TrainConfig"):
    tvq.init_train_state(TRAIN, CONFIG, jax.random.key(0))


def test_codes_cannot_be_revived_with_accumulation():
  with pytest.raises(ValueError, match=r"c_revive=0\.5 and n_accumulate=2: .* Set n_accumulate=1"):
    tvq.make_train_step(CONFIG.replace(c_revive=0.5), TRAIN.replace(n_accumulate=2))


@pytest.mark.parametrize(
  "mesh, model",
  [
    (None, {}),
    ("data:8", {}),
    ("data:2,fsdp:4", {}),
    ("model:8", {}),  # divides the value width
    ("model:2", dict(head_type="mha", n_head=2, d_v=3)),  # divides the heads
    ("sequence:8", {}),
    ("sequence:1", dict(attn_type="full", mem_len=64)),
  ],
)
def test_compatible_sizes_are_accepted(mesh, model):
  mesh = sharding.make_mesh(mesh) if mesh else None
  size_checks.check_sizes(CONFIG.replace(**model), TRAIN, mesh)
