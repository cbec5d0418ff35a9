"""Optional dependencies: imported where they are used, named where they are missing."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, extra: str, purpose: str) -> Any:
  """Imports `module`.

  Raises:
    ImportError: it is not installed; the message says which extra brings it.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ImportError(
      f"{purpose} need {module.split('.')[0]}, which is not installed: "
      f"pip install 'tvq_haiku[{extra}]'."
    ) from error
