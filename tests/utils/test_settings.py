"""The base class of configurations: types, checks, copies and JSON of any dataclass."""

import dataclasses

import pytest

from tvq_haiku.utils import settings


@settings.document_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(settings.Settings):
  """An example."""

  name: str = settings.setting(settings.REQUIRED, "Name of the example.")
  rate: float = settings.setting(0.5, "Rate, at least 0.")
  size: int | None = settings.setting(None, "Size, at least 1. None: no size.")
  mode: str = settings.setting("a", "'a' or 'b'.")
  names: str | tuple[str, str] = settings.setting("x", "One name or two.")

  def __post_init__(self):
    self._check_types()
    self._check_minimum(0, "rate")
    self._check_minimum(1, "size")
    self._check_choice("mode", ("a", "b"))
    self._require(self.mode == "a" or self.size is None, "mode size", "'b' has no size")


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(name=3), "Example: name=3: must be a str"),
    (dict(rate="1"), "rate='1': must be a finite number"),
    (dict(rate=True), "rate=True: must be a finite number"),
    (dict(rate=float("nan")), "rate=nan: must be a finite number"),
    (dict(rate=-1), "rate=-1: must be at least 0"),
    (dict(size=2.0), "size=2.0: must be an integer"),
    (dict(size=0), "size=0: must be at least 1"),
    (dict(mode="c"), r"mode='c': must be one of \('a', 'b'\)"),
    (dict(names=3), "names=3: must be a str or a tuple"),
    (dict(mode="b", size=2), "mode='b', size=2: 'b' has no size"),
  ],
)
def test_errors_name_the_class_and_print_the_values(changes, message):
  with pytest.raises(ValueError, match=message):
    Example(**{"name": "x", **changes})


def test_an_integer_is_accepted_as_a_float_and_none_as_an_optional():
  assert Example(name="x", rate=2, size=None).rate == 2


def test_a_required_setting_has_no_default():
  with pytest.raises(TypeError, match="name"):
    Example()


def test_copies_and_values_from_json_are_validated():
  example = Example(name="x", size=3)
  assert example.replace(size=4) == Example(name="x", size=4)
  assert Example.from_json(example.to_json()) == example
  with pytest.raises(ValueError, match="size=0"):
    example.replace(size=0)
  with pytest.raises(ValueError, match="size=0"):
    Example.from_json('{"name": "x", "size": 0}')
  with pytest.raises(ValueError, match=r"unknown settings \['width'\].*Known settings: \['mode'"):
    Example.from_json('{"name": "x", "width": 0}')


def test_help_texts_are_appended_to_the_docstring():
  texts = settings.field_help(Example)
  assert list(texts) == ["name", "rate", "size", "mode", "names"]
  assert texts["rate"] == "Rate, at least 0."
  assert "  Args:\n    name: Name of the example.\n    rate: Rate, at least 0." in Example.__doc__
