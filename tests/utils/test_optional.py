"""Optional dependencies."""

import json

import pytest

from tvq_haiku.utils import optional


def test_installed_module_is_returned():
  assert optional.require("json", extra="train", purpose="tests") is json


def test_missing_module_is_named_with_its_extra():
  with pytest.raises(
    ImportError,
    match=(
      r"^missing is required for event files, but it is not installed: "
      r"pip install 'tvq_haiku\[train\]'\.$"
    ),
  ):
    optional.require("missing.sub", extra="train", purpose="event files")
