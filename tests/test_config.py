"""Validation, precision policies, help texts and JSON of the configurations."""

import dataclasses

import jax.numpy as jnp
import pytest

import tvq_haiku as tvq
from tvq_haiku import config as config_lib
from tvq_haiku import train_config


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
    (dict(pe_lam="x"), "pe_lam='x': must be a finite number"),
    (dict(p_dropres=-0.1), r"p_dropres=-0.1: a dropout rate must be in \[0, 1\)"),
    (dict(p_droplyr=1.0), "p_droplyr=1.0: a dropout rate"),
    (dict(c_gamma=1.0), r"c_gamma=1.0: must be in \[0, 1\)"),
    (dict(c_revive=1.0), r"c_revive=1.0: must be in \[0, 1\)"),
    (dict(c_beta=-1.0), "c_beta=-1.0: must be at least 0"),
    (dict(e_scale=0.0), "e_scale=0.0: must be positive"),
    (dict(pe_lam=0.0), "pe_lam=0.0: must be positive"),
    (
      dict(precision="float33"),
      "precision='float33': must be 'float32', 'bfloat16' or a jmp policy",
    ),
    (dict(precision=""), "precision='': must be 'float32', 'bfloat16' or a jmp policy"),
    (dict(precision="params=bfloat16,compute=bfloat16"), "with float32 parameters"),
    (dict(e_scale=float("inf")), "e_scale=inf: must be a finite number"),
    (dict(head_type="gqa"), "head_type='gqa': must be one of"),
    (dict(attn_type="linear"), "attn_type='linear': must be one of"),
    (dict(attn_type=3), "attn_type=3: must be a str or a tuple"),
    (dict(attn_type=("vq", "x")), r"attn_type=\('vq', 'x'\): must be one of .*, or a pair"),
    (dict(attn_type=("vq", 3)), r"attn_type=\('vq', 3\): must be one of .*, or a pair"),
    (dict(attn_type=("vq", "full", "vq")), "must be one of .*, or a pair of these"),
    (dict(attn_type=()), "must be one of .*, or a pair of these"),
    (
      dict(attn_type=("vq", "full"), head_type="mha"),
      r"attn_type=\('vq', 'full'\), head_type='mha': a pair needs head_type='shga'",
    ),
    (
      dict(attn_type=("vq", "window"), causal=False),
      r"attn_type=\('vq', 'window'\), causal=False: 'window' needs causal=True",
    ),
    (dict(full_len=0), "full_len=0: must be at least 1"),
    (dict(no_emb=1), "no_emb=1: must be a bool"),
    (dict(reduction="loop"), "reduction='loop': must be one of"),
    (dict(remat="all"), "remat='all': must be one of"),
    (
      dict(head_type="mqa", n_head=4, n_kv_head=2),
      "head_type='mqa', n_kv_head=2: n_kv_head must be 1",
    ),
    (dict(n_head=4, n_kv_head=3), "n_head=4, n_kv_head=3: n_kv_head must divide n_head"),
  ],
)
def test_error_names_an_invalid_model_setting(changes, message):
  with pytest.raises(ValueError, match=message):
    tvq.TransformerConfig(**{"n_vocab": 259, **changes})


def test_unknown_settings_are_refused():
  with pytest.raises(TypeError, match="d_modl"):
    tvq.TransformerConfig(n_vocab=259, d_modl=3)
  with pytest.raises(ValueError, match=r"unknown settings \['d_modl'\]"):
    tvq.TransformerConfig.from_json('{"n_vocab": 259, "d_modl": 3}')
  with pytest.raises(ValueError, match="expected a JSON object, got list"):
    tvq.TrainConfig.from_json("[]")


def test_configs_are_frozen_and_round_trip_through_json():
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


def test_a_pair_of_attention_types_is_kept_in_json_and_equal_types_are_one():
  config = tvq.TransformerConfig.tiny(attn_type=("vq", "full"), full_len=64)
  assert config == tvq.TransformerConfig.tiny(attn_type=["vq", "full"], full_len=64)
  again = tvq.TransformerConfig.from_json(config.to_json())
  assert again == config and hash(again) == hash(config) and again.attn_type == ("vq", "full")
  assert config.replace(attn_type=("full", "full")).attn_type == "full"


@pytest.mark.parametrize(
  "settings, expected",
  [
    (dict(), [("vq", 16), ("vq", 16)]),
    (dict(head_type="mha", full_len=64), [("vq", 16)]),
    (dict(attn_type="full"), [("full", 16), ("full", 16)]),
    (dict(attn_type="full", head_type="mqa", full_len=64), [("full", 64)]),
    (dict(attn_type=("full", "vq"), full_len=64), [("full", 64), ("vq", 16)]),
    (dict(attn_type=("window", "full"), full_len=64), [("full", 16), ("full", 64)]),
  ],
)
def test_attention_configs_give_type_and_length_of_each_attention(settings, expected):
  configs = tvq.TransformerConfig.tiny(**settings).attention_configs
  assert [(config.attn_type, config.mem_len) for config in configs] == expected


@pytest.mark.parametrize(
  "precision, compute",
  [
    ("float32", jnp.float32),
    ("bfloat16", jnp.bfloat16),
    ("params=float32,compute=bfloat16,output=float32", jnp.bfloat16),
  ],
)
def test_precision_selects_a_policy(precision, compute):
  config = tvq.TransformerConfig.tiny(precision=precision)
  assert config.compute_dtype == compute
  assert config.policy.param_dtype == jnp.float32


@pytest.mark.parametrize(
  "precision",
  [
    "float16",
    "params=float32,compute=float16,output=float32",
    "params=float32,compute=float32,output=float16",
  ],
)
def test_float16_is_refused_because_there_is_no_loss_scaling(precision):
  with pytest.raises(ValueError, match=r"loss scaling.*use 'bfloat16' or 'float32'") as error:
    tvq.TransformerConfig.tiny(precision=precision)
  assert f"precision={precision!r}" in str(error.value)


@pytest.mark.parametrize("cls", [tvq.TransformerConfig, tvq.TrainConfig])
def test_every_field_has_a_help_text_that_the_docstring_contains(cls):
  texts = config_lib.field_help(cls)
  assert list(texts) == [field.name for field in dataclasses.fields(cls)]
  docstring = " ".join(cls.__doc__.split())
  for name, text in texts.items():
    assert f"{name}: {text}" in docstring


@pytest.mark.parametrize(
  "name, choices",
  [
    ("head_type", config_lib.HEAD_TYPES),
    ("attn_type", config_lib.ATTN_TYPES),
    ("reduction", config_lib.REDUCTIONS),
    ("remat", config_lib.REMATS),
    ("optimizer", train_config.OPTIMIZERS),
    ("lr_schedule", train_config.LR_SCHEDULES),
  ],
)
def test_help_texts_list_all_choices(name, choices):
  texts = config_lib.field_help(tvq.TransformerConfig) | config_lib.field_help(tvq.TrainConfig)
  assert all(f"'{choice}'" in texts[name] for choice in choices)


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
def test_head_type_determines_key_value_heads_and_mlp_width(settings, kv_heads, mlp_width):
  config = tvq.TransformerConfig(n_vocab=259, **settings)
  assert config.kv_heads == kv_heads
  assert config.gated == (mlp_width is None)
  if mlp_width:
    assert config.mlp_width == mlp_width
