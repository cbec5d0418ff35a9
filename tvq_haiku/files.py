"""Writing to disk so that nothing half-written is ever read."""

from __future__ import annotations

import os
import pathlib
import uuid


def prepare_directory(directory: str | os.PathLike) -> pathlib.Path:
  """Makes `directory` and proves that it can be written to.

  Raises:
    OSError: it can't; the message names it.
  """
  path = pathlib.Path(directory).absolute()
  probe = path / f".probe-{uuid.uuid4().hex}"
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(b"")
    probe.unlink()
  except OSError as error:
    raise OSError(f"cannot write to the directory {path}: {error.strerror}.") from error
  return path


def write_whole(file: pathlib.Path, text: str) -> None:
  """Writes a file that appears whole or not at all, even if the process dies on the way."""
  draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
  draft.write_text(text)
  os.replace(draft, file)
