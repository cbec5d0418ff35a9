"""Base class of the frozen configurations: help texts of fields, checks, conversion to JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
import types
import typing
from typing import Any, Self

REQUIRED = dataclasses.MISSING  # the `default` argument of a setting without a default


def setting(default: Any, help_text: str) -> Any:
  """Returns a dataclass field with a default value and a help text."""
  return dataclasses.field(default=default, metadata={"help": help_text})


def field_help(cls: type[Settings]) -> dict[str, str]:
  """Returns the help text of every field of a configuration class, in the order of the fields.

  >>> @dataclasses.dataclass(frozen=True, kw_only=True)
  ... class Sizes(Settings):
  ...   width: int = setting(8, "Model width.")
  >>> field_help(Sizes)
  {'width': 'Model width.'}
  """
  return {field.name: field.metadata["help"] for field in dataclasses.fields(cls)}


def document_fields(cls: type[Settings]) -> type[Settings]:
  """Appends an `Args:` section with the help text of every field to the docstring of `cls`."""
  entries = (
    textwrap.fill(f"{name}: {text}", 100, initial_indent=" " * 4, subsequent_indent=" " * 6)
    for name, text in field_help(cls).items()
  )
  cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "  Args:", *entries, "  "])
  return cls


class Settings:
  """Checks, copies with changes, and conversion to and from JSON, for frozen dataclasses."""

  def replace(self, **changes: Any) -> Self:
    """Returns a copy with some fields changed; the copy is validated."""
    return type(self)(**(dataclasses.asdict(self) | changes))

  def to_json(self) -> str:
    """Returns all fields as a JSON object with sorted keys."""
    return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True)

  @classmethod
  def from_json(cls, text: str) -> Self:
    """Returns the configuration whose `to_json` returned `text`.

    Raises:
      ValueError: `text` is not a JSON object, or contains unknown or invalid settings.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
      raise ValueError(f"{cls.__name__}: expected a JSON object, got {type(values).__name__}.")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
      raise ValueError(
        f"{cls.__name__}: unknown settings {unknown}; remove or rename them. "
        f"Known settings: {sorted(known)}."
      )
    return cls(**values)

  def _require(self, condition: bool, names: str, rule: str) -> None:
    """Raises a ValueError that prints the values of the fields `names` if `condition` is False."""
    if not condition:
      values = ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())
      raise ValueError(f"{type(self).__name__}: {values}: {rule}.")

  def _check_types(self) -> None:
    """Checks every field against its annotation; an int is accepted where a float is declared."""
    for name, hint in typing.get_type_hints(type(self)).items():
      value = getattr(self, name)
      hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
      if value is None and types.NoneType in hints:
        continue
      kinds = tuple(typing.get_origin(x) or x for x in hints if x is not types.NoneType)
      is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
      if kinds == (float,):
        self._require(is_number and math.isfinite(value), name, "must be a finite number")
      elif kinds == (int,):
        self._require(is_number and isinstance(value, int), name, "must be an integer")
      else:
        expected = " or a ".join(kind.__name__ for kind in kinds)
        self._require(isinstance(value, kinds), name, f"must be a {expected}")

  def _check_minimum(self, minimum: int, names: str) -> None:
    """Checks that each of the fields `names` is None or at least `minimum`."""
    for name in names.split():
      value = getattr(self, name)
      self._require(value is None or value >= minimum, name, f"must be at least {minimum}")

  def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
    """Checks that the field `name` is one of `choices`."""
    self._require(getattr(self, name) in choices, name, f"must be one of {choices}")
