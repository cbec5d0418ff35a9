"""Defines a flag, --config.FIELD, for each field of the two configurations."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any, TypeVar

from absl import flags

from experiments import specs
import tvq_haiku as tvq
from tvq_haiku import config as config_lib

Config = TypeVar("Config", tvq.TransformerConfig, tvq.TrainConfig)


class _FieldParser(flags.ArgumentParser):
  """Parses the value of one configuration field according to the field's type annotation."""

  def __init__(self, annotation: Any):
    kinds = (
      typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    self._is_optional = types.NoneType in kinds
    self._may_be_pair = any(typing.get_origin(kind) is tuple for kind in kinds)
    self._kind = kinds[0]

  def parse(self, argument: str) -> Any:
    """Returns the value of `argument`.

    "none" means None if the field may be None, and "a,b" means ("a", "b") if it may be a pair.
    """
    if self._is_optional and argument.lower() == "none":
      return None
    if self._may_be_pair and "," in argument:
      return tuple(argument.split(","))
    if self._kind is bool:
      if argument.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
      return argument.lower() == "true"
    try:
      return self._kind(argument)
    except ValueError:
      raise ValueError({int: "must be an integer", float: "must be a number"}[self._kind]) from None

  def flag_type(self) -> str:
    """Returns the name of the type, for absl's own messages."""
    return self._kind.__name__


def define_flags(
  presets: Mapping[str, specs.SizePreset], flag_values: flags.FlagValues = flags.FLAGS
) -> None:
  """Defines --config.FIELD for each field of both configurations, and --precision.

  The help of a flag is the comment of its field, followed by the field's value in each preset.

  Args:
    presets: name of a size -> preset, whose values the help texts name as defaults.
    flag_values: where to define the flags.
  """
  for cls, configs in (
    (tvq.TransformerConfig, {size: preset.config for size, preset in presets.items()}),
    (tvq.TrainConfig, {size: preset.train_cfg for size, preset in presets.items()}),
  ):
    comments, annotations = config_lib.field_help(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
      defaults = {size: getattr(config, field.name) for size, config in configs.items()}
      flags.DEFINE(
        _FieldParser(annotations[field.name]),
        f"config.{field.name}",
        None,
        f"{comments[field.name]} ({_describe_defaults(defaults)})",
        serializer=flags.ArgumentSerializer(),
        flag_values=flag_values,
      )
  flags.DEFINE_string("precision", None, "Same as --config.precision.", flag_values=flag_values)


def explicit_values(
  cls: type[tvq.TransformerConfig] | type[tvq.TrainConfig],
  flag_values: flags.FlagValues = flags.FLAGS,
) -> dict[str, Any]:
  """Returns the fields of `cls` whose flags were given, with their values."""
  by_field = {field.name: flag_values[f"config.{field.name}"] for field in dataclasses.fields(cls)}
  values = {name: flag.value for name, flag in by_field.items() if flag.present}
  if cls is tvq.TransformerConfig and flag_values["precision"].present:
    values["precision"] = flag_values["precision"].value
  return values


def apply_changes(config: Config, changes: Mapping[str, Any]) -> Config:
  """Returns `config` with the fields of `changes`.

  Args:
    config: a configuration.
    changes: field -> value, from `explicit_values`.

  Raises:
    IllegalFlagValueError: the configuration would be invalid.
  """
  try:
    return config.replace(**changes)
  except ValueError as error:
    raise flags.IllegalFlagValueError(f"--config: {error}") from error


def _describe_defaults(values: Mapping[str, Any]) -> str:
  """Describes the default of a field: one value, or a value per size if they differ.

  >>> _describe_defaults({"paper": 24, "cpu": 1, "smoke": 1})
  'default: paper 24, cpu 1, smoke 1'
  >>> _describe_defaults({"paper": 0.0, "cpu": 0.0})
  'default: 0.0'
  """
  if len(set(values.values())) == 1:
    return f"default: {next(iter(values.values()))}"
  return "default: " + ", ".join(f"{size} {value}" for size, value in values.items())
