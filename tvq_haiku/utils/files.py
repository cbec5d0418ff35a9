"""Writing to disk so that nothing half-written, and nothing damaged, is ever read."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import uuid
import zlib


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


def write_atomically(file: pathlib.Path, content: str | bytes) -> None:
  """Writes a file that appears whole or not at all, even if the process dies on the way."""
  draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
  try:
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(draft, file)
  except OSError as error:
    raise OSError(f"cannot write {file}: {error.strerror}.") from error
  finally:
    draft.unlink(missing_ok=True)


def unused_path(path: pathlib.Path) -> pathlib.Path:
  """`path`, or, if it is there already, the first of path-2, path-3, ... that is not."""
  for i in itertools.count(1):
    place = path if i == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")
    if not place.exists():
      return place


@contextlib.contextmanager
def lock(file: pathlib.Path, *, wait: bool = True) -> Iterator[None]:
  """Holds a lock that the system takes back when the process ends, however it ends.

  Raises:
    BlockingIOError: another process holds it, and this one would not `wait`.
  """
  with file.open("w") as handle:
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    yield


def write_manifest(directory: pathlib.Path, name: str) -> None:
  """Notes size and CRC-32 of every file under `directory` in its file `name`."""
  write_atomically(
    directory / name, json.dumps(_contents(directory, name), indent=1, sort_keys=True)
  )


def check_manifest(directory: pathlib.Path, name: str) -> None:
  """Holds the files under `directory` against its manifest, if it has one.

  A process that dies between the files and their manifest leaves files that are whole, and none.

  Raises:
    ValueError: a file is missing or has changed; the message names it.
  """
  if not (directory / name).exists():
    return
  contents = _contents(directory, name)
  for file, noted in json.loads((directory / name).read_text()).items():
    if contents.get(file) != noted:
      problem = "has changed" if file in contents else "is missing"
      raise ValueError(f"{file} {problem}.")


def _contents(directory: pathlib.Path, manifest: str) -> dict[str, list[int]]:
  """Path -> [size, CRC-32] of all files but the manifest."""
  contents = {}
  for file in sorted(directory.rglob("*")):
    if file.is_file() and file.name != manifest:
      checksum = 0
      with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
          checksum = zlib.crc32(chunk, checksum)
      contents[file.relative_to(directory).as_posix()] = [file.stat().st_size, checksum]
  return contents


def short_message(error: Exception) -> str:
  """Returns the first line of an error's message, at most 200 characters of it.

  >>> short_message(ValueError("first\\nsecond"))
  'first'
  """
  text = str(error).strip()
  if "No space left" in text:
    return "no space left on the device"
  return text.splitlines()[0][:200] if text else type(error).__name__
