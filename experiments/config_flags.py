"""Every setting of the model and of its training as a flag, --config.NAME."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any

from absl import flags

import tvq_haiku as tvq

_PRECISION = flags.DEFINE_string("precision", None, "Short for --config.precision.")


class _Setting(flags.ArgumentParser):
  """Reads one field of a configuration."""

  def __init__(self, hint: Any):
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    self._is_optional = types.NoneType in kinds
    self._kind = kinds[0]

  def parse(self, argument: str) -> Any:
    if self._is_optional and argument.lower() == "none":
      return None
    if self._kind is bool:
      if argument.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
      return argument.lower() == "true"
    try:
      return self._kind(argument)
    except ValueError:
      raise ValueError({int: "must be an integer", float: "must be a number"}[self._kind]) from None

  def flag_type(self) -> str:
    return self._kind.__name__


def _define_settings() -> None:
  for cls in (tvq.TransformerConfig, tvq.TrainConfig):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
      flags.DEFINE(
        _Setting(hints[field.name]),
        f"config.{field.name}",
        None,
        f"{cls.__name__}.{field.name}; default: of the chosen size.",
        serializer=flags.ArgumentSerializer(),
      )


_define_settings()


def explicit_flags(cls: type) -> dict[str, Any]:
  """The fields of `cls` that flags set."""
  all_flags = {field.name: flags.FLAGS[f"config.{field.name}"] for field in dataclasses.fields(cls)}
  values = {name: flag.value for name, flag in all_flags.items() if flag.present}
  if cls is tvq.TransformerConfig and _PRECISION.value is not None:
    values["precision"] = _PRECISION.value
  return values


def apply_flags(config: Any, given: Mapping[str, Any]) -> Any:
  """`config` with the fields of `explicit_flags`; what does not go together is a wrong flag."""
  try:
    return config.replace(**given)
  except ValueError as error:
    raise flags.IllegalFlagValueError(f"--config: {error}") from error
