"""Configuration fields as flags: help texts, parsing, and which fields were given."""

import dataclasses

from absl import flags
import pytest

from experiments import config_flags, enwik8, specs
import tvq_haiku as tvq
from tvq_haiku import config as config_lib


def parse(*arguments):
  """Returns the flags of enwik8's configurations after parsing `arguments`."""
  flag_values = flags.FlagValues()
  config_flags.define_flags(enwik8.SPEC.presets, flag_values)
  flag_values(["enwik8", *arguments])
  return flag_values


def test_help_is_the_comment_of_the_field_and_its_value_in_each_size():
  flag_values = parse()
  for cls in (tvq.TransformerConfig, tvq.TrainConfig):
    comments = config_lib.field_help(cls)
    for field in dataclasses.fields(cls):
      help_text = flag_values[f"config.{field.name}"].help
      assert help_text.startswith(comments[field.name] + " (default: "), field.name
  assert flag_values["config.n_layer"].help.endswith("(default: paper 24, cpu 1, smoke 1)")
  assert flag_values["config.n_max_step"].help.endswith(
    "(default: paper 125000, cpu 4000, smoke 20)"
  )
  assert flag_values["config.c_gamma"].help.endswith("(default: 0.99)")


def test_nothing_is_changed_if_no_flag_is_given():
  flag_values = parse()
  assert config_flags.explicit_values(tvq.TransformerConfig, flag_values) == {}
  assert config_flags.explicit_values(tvq.TrainConfig, flag_values) == {}


def test_values_have_the_type_of_their_field():
  flag_values = parse(
    "--config.n_kv_head=None",
    "--config.pe_abs=TRUE",
    "--config.c_beta=0",
    "--config.reduction=scan",
    "--config.lr_max=1e-3",
    "--config.grad_clip=none",
  )
  assert config_flags.explicit_values(tvq.TransformerConfig, flag_values) == {
    "n_kv_head": None,
    "pe_abs": True,
    "c_beta": 0.0,
    "reduction": "scan",
  }
  training = config_flags.explicit_values(tvq.TrainConfig, flag_values)
  assert training == {"lr_max": 1e-3, "grad_clip": None}


def test_a_comma_separates_the_attention_types_of_a_pair():
  for argument, value in (("vq,full", ("vq", "full")), ("full", "full")):
    values = config_flags.explicit_values(
      tvq.TransformerConfig, parse(f"--config.attn_type={argument}")
    )
    assert values == {"attn_type": value}


def test_precision_has_a_short_flag():
  values = config_flags.explicit_values(tvq.TransformerConfig, parse("--precision=bfloat16"))
  assert values == {"precision": "bfloat16"}


@pytest.mark.parametrize(
  "argument, message",
  [
    ("--config.n_layer=1.5", "must be an integer"),
    ("--config.n_layer=none", "must be an integer"),
    ("--config.c_beta=much", "must be a number"),
    ("--config.pe_abs=1", "must be true or false"),
  ],
)
def test_values_of_a_wrong_type_are_refused(argument, message):
  with pytest.raises(flags.IllegalFlagValueError, match=message):
    parse(argument)


def test_invalid_combinations_are_wrong_flags():
  config = specs.TEXT_SMOKE.config
  assert config_flags.apply_changes(config, {"n_layer": 3}) == config.replace(n_layer=3)
  with pytest.raises(flags.IllegalFlagValueError, match=r"--config: .*n_layer=0: must be"):
    config_flags.apply_changes(config, {"n_layer": 0})
