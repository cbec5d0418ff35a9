"""Files on disk: atomic writes, locks between processes, and manifests that reveal damage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import uuid
import zlib

_CHUNK_BYTES = 1 << 20
_MESSAGE_LENGTH = 200  # characters


def prepare_directory(directory: str | os.PathLike) -> pathlib.Path:
  """Creates a directory if it is missing, checks that it is writable, and returns its path.

  Raises:
    OSError: the directory cannot be created or written to; the message names it.
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
  """Writes a file so that readers see its old or its new content and never a part of it.

  This holds even if the process is killed while it writes.

  Args:
    file: the file to create or replace; its directory must exist.
    content: the new content; a string is encoded as UTF-8. Surrogate escapes, which stand for the
      bytes of file names that are not UTF-8, are written as these bytes.

  Raises:
    OSError: the file cannot be written; the message names it.
  """
  draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
  try:
    if isinstance(content, str):
      content = content.encode(errors="surrogateescape")
    draft.write_bytes(content)
    os.replace(draft, file)
  except OSError as error:
    raise OSError(f"cannot write {file}: {error.strerror}.") from error
  finally:
    draft.unlink(missing_ok=True)


def write_directory(directory: pathlib.Path, contents: Mapping[str, bytes]) -> None:
  """Writes a new directory so that readers see all of its files or none.

  Args:
    directory: the directory to create. It may exist if it is empty.
    contents: name of a file -> its content.

  Raises:
    FileExistsError: the directory holds files, or it is a file.
    OSError: the directory cannot be written; the message names it.
  """
  if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
    raise FileExistsError(f"{directory} exists already: name a new directory, or an empty one.")
  parent = prepare_directory(directory.parent)
  draft = parent / f".{directory.name}.{uuid.uuid4().hex}"
  try:
    draft.mkdir()
    for name, content in contents.items():
      (draft / name).write_bytes(content)
    os.replace(draft, directory)
  except OSError as error:
    raise OSError(f"cannot write {directory}: {error.strerror}.") from error
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def unused_path(path: pathlib.Path) -> pathlib.Path:
  """Returns `path` if nothing exists there, otherwise the first free one of name-2, name-3, ..."""
  for i in itertools.count(1):
    candidate = path if i == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}")
    if not candidate.exists():
      return candidate


@contextlib.contextmanager
def lock(file: pathlib.Path, *, wait: bool = True) -> Iterator[None]:
  """Holds an exclusive lock on a file; the system releases it when the process ends.

  Args:
    file: the lock file, which is created or emptied.
    wait: wait for another process to release the lock, instead of raising an error.

  Raises:
    BlockingIOError: another process holds the lock, and `wait` is False.
  """
  with file.open("w", encoding="utf-8") as handle:
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    yield


def write_manifest(directory: pathlib.Path, name: str) -> None:
  """Writes the size and the CRC-32 of every file under `directory` to `directory / name`."""
  manifest = json.dumps(_sizes_and_checksums(directory, name), indent=1, sort_keys=True)
  write_atomically(directory / name, manifest)


def check_manifest(directory: pathlib.Path, name: str) -> None:
  """Checks the files under `directory` against the manifest `directory / name`.

  A missing manifest is not an error: a process may end after it has written its files and before
  it writes their manifest.

  Raises:
    OSError: a file cannot be read.
    ValueError: a file is missing or has changed, or the manifest is damaged.
  """
  if not (directory / name).exists():
    return
  manifest = json.loads((directory / name).read_text(encoding="utf-8"))
  if not isinstance(manifest, dict):
    raise ValueError(f"{name} is damaged: it is not a JSON object.")
  found = _sizes_and_checksums(directory, name)
  for file, expected in manifest.items():
    if file not in found:
      raise ValueError(f"{file} is missing.")
    if found[file] != expected:
      raise ValueError(f"{file} has changed.")


def _sizes_and_checksums(directory: pathlib.Path, manifest: str) -> dict[str, list[int]]:
  """Returns {relative path: [size in bytes, CRC-32]} of all files except the manifest."""
  contents = {}
  for file in sorted(directory.rglob("*")):
    if file.is_file() and file.name != manifest:
      checksum = 0
      with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
          checksum = zlib.crc32(chunk, checksum)
      contents[file.relative_to(directory).as_posix()] = [file.stat().st_size, checksum]
  return contents


def short_message(error: Exception) -> str:
  r"""Returns the first line of an error's message, shortened, for use in another message.

  >>> short_message(ValueError("first line\nsecond line"))
  'first line'
  >>> short_message(OSError())
  'OSError'
  """
  text = str(error).strip()
  if "No space left" in text:
    return "no space left on the device"
  return text.splitlines()[0][:_MESSAGE_LENGTH] if text else type(error).__name__
