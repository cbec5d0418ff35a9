"""Configurations say what is wrong with them."""

import dataclasses

import jax.numpy as jnp
import pytest

import tvq_haiku as tvq


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(d_model=31), "d_model=31: must be even"),
    (dict(d_model=0), "d_model=0: must be at least 1"),
    (dict(n_code=-4), "n_code=-4: must be at least 1"),
    (dict(block_len=0), "block_len=0: must be at least 1"),
    (dict(mem_len=0), "mem_len=0: must be at least 1"),
    (dict(n_layer=2.0), "n_layer=2.0: must be an integer"),
    (dict(n_head=True), "n_head=True: must be an integer"),
    (dict(e_tie=1), "e_tie=1: must be a bool"),
    (dict(pe_lam="x"), "pe_lam='x': must be a number"),
    (dict(p_dropres=-0.1), r"p_dropres=-0.1: a dropout rate must lie in \[0, 1\)"),
    (dict(p_droplyr=1.0), "p_droplyr=1.0: a dropout rate"),
    (dict(c_gamma=1.0), "c_gamma=1.0"),
    (dict(c_beta=-1.0), "c_beta=-1.0"),
    (dict(e_scale=0.0), "e_scale=0.0"),
    (dict(pe_lam=0.0), "pe_lam=0.0"),
    (
      dict(precision="float33"),
      "precision='float33': must be 'float32', 'bfloat16' or a jmp policy",
    ),
    (dict(precision="half"), "precision='half': must be"),
    (dict(precision="params=bfloat16,compute=bfloat16"), "with float32 parameters"),
    (dict(e_scale=float("inf")), "e_scale=inf: must be a number"),
    (dict(head_type="gqa"), "head_type='gqa': must be one of"),
    (dict(attn_type="linear"), "attn_type='linear': must be one of"),
    (dict(reduction="loop"), "reduction='loop': must be one of"),
    (dict(remat="all"), "remat='all': must be one of"),
    (dict(head_type="mqa", n_head=4, n_kv_head=2), "head_type='mqa', n_kv_head=2: mqa has one"),
    (dict(n_head=4, n_kv_head=3), "n_head=4, n_kv_head=3: n_kv_head must divide n_head"),
  ],
)
def test_model_settings_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    tvq.TransformerConfig(**{"n_vocab": 259, **changes})


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(optimizer="sgd"), "optimizer='sgd': must be one of"),
    (dict(lr_schedule="step"), "lr_schedule='step': must be one of"),
    (dict(lr_max=-1e-3), "lr_max=-0.001: must not be negative"),
    (dict(wd_lam=-0.1), "wd_lam=-0.1: must not be negative"),
    (dict(grad_clip=0.0), "grad_clip=0.0: must be positive, or None"),
    (dict(update_len=100), "sequence_len=512, update_len=100: update_len must divide"),
    (dict(n_warmup_step=1000), "n_warmup_step=1000, n_max_step=1000: the warm-up must end"),
    (dict(global_batch_size=0), "global_batch_size=0: must be at least 1"),
  ],
)
def test_training_settings_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    tvq.TrainConfig(**changes)


def test_unknown_names_are_refused():
  with pytest.raises(TypeError, match="d_modl"):
    tvq.TransformerConfig(n_vocab=259, d_modl=3)
  with pytest.raises(ValueError, match=r"unknown settings \['d_modl'\]"):
    tvq.TransformerConfig.from_json('{"n_vocab": 259, "d_modl": 3}')
  with pytest.raises(ValueError, match="expected a JSON object, got list"):
    tvq.TrainConfig.from_json("[]")


def test_configs_are_frozen_and_survive_json():
  for config in (
    tvq.TransformerConfig.enwik8(),
    tvq.TransformerConfig.pg19(d_model=64),
    tvq.TransformerConfig.imagenet64(),
    tvq.TransformerConfig.tiny(n_layer=1),
    tvq.TrainConfig(grad_clip=None),
  ):
    assert type(config).from_json(config.to_json()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
      config.d_model = 3
  assert tvq.TransformerConfig.pg19(d_model=64).d_model == 64
  with pytest.raises(ValueError, match="d_k=0"):
    tvq.TransformerConfig.tiny().replace(d_k=0)


@pytest.mark.parametrize(
  "precision, compute",
  [
    ("float32", jnp.float32),
    ("bfloat16", jnp.bfloat16),
    ("params=float32,compute=float16,output=float32", jnp.float16),
  ],
)
def test_precision_names_a_policy(precision, compute):
  config = tvq.TransformerConfig.tiny(precision=precision)
  assert config.compute_dtype == compute
  assert config.policy.param_dtype == jnp.float32


@pytest.mark.parametrize(
  "settings, kv_heads, mlp_width",
  [
    (dict(n_head=4), 4, None),
    (dict(n_head=4, n_kv_head=2), 2, None),
    (dict(head_type="mha", n_head=4), 4, 1024),
    (dict(head_type="mha", n_head=4, n_kv_head=2), 2, 1024),
    (dict(head_type="mqa", n_head=4), 1, 1280),
    (dict(head_type="mqa", n_head=4, n_kv_head=1), 1, 1280),
  ],
)
def test_head_types(settings, kv_heads, mlp_width):
  config = tvq.TransformerConfig(n_vocab=259, **settings)
  assert config.kv_heads == kv_heads
  assert config.gated == (mlp_width is None)
  if mlp_width:
    assert config.mlp_width == mlp_width
