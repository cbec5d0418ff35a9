"""Every example in a docstring runs, and the public names are documented."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import tvq_haiku as tvq

MODULES = sorted(module.name for module in pkgutil.walk_packages(tvq.__path__, "tvq_haiku."))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
  module = importlib.import_module(name)
  assert module.__doc__
  results = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
  assert results.failed == 0


def test_public_names_are_documented():
  for name in vars(tvq):
    value = getattr(tvq, name)
    if not name.startswith("_") and not inspect.ismodule(value):
      assert inspect.getdoc(value), name


def test_public_functions_show_how_they_are_called():
  for name in (
    "vq_attention",
    "make_transformer",
    "initial_state",
    "TransformerConfig",
    "TrainConfig",
  ):
    assert ">>>" in inspect.getdoc(getattr(tvq, name)), name
