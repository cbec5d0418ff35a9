"""Optional dependencies, which are imported only where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
  """Imports and returns a module of an optional dependency.

  Args:
    module: the module to import, such as "orbax.checkpoint".
    extra: the extra of `tvq_haiku` that installs it, such as "train".
    purpose: what it is needed for, such as "checkpoints"; part of the message.

  Raises:
    ImportError: it is not installed; the message says how to install it.

  >>> require("missing", extra="train", purpose="checkpoints")
  Traceback (most recent call last):
  ImportError: missing is required for checkpoints, but it is not installed: ...
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ImportError(
      f"{module.split('.')[0]} is required for {purpose}, but it is not installed: "
      f"pip install 'tvq_haiku[{extra}]'."
    ) from error
