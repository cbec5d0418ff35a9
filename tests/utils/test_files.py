"""Atomic writes, locks and manifests."""

import ast
import errno
import os
import pathlib
import subprocess
import sys

import pytest

from tvq_haiku.utils import files

import privileges


def test_prepare_directory_creates_it_and_leaves_it_empty(tmp_path):
  path = files.prepare_directory(tmp_path / "a" / "b")
  assert path == tmp_path / "a" / "b" and path.is_absolute()
  assert os.listdir(path) == []


def test_prepare_directory_names_a_directory_that_is_not_writable(tmp_path):
  tmp_path.chmod(0o555)
  try:
    with privileges.dropped():
      with pytest.raises(OSError, match=f"to the directory {tmp_path}: Permission denied"):
        files.prepare_directory(tmp_path)
  finally:
    tmp_path.chmod(0o755)


def test_write_atomically_replaces_the_content(tmp_path):
  for content, expected in (
    ("häuser\n", "häuser\n".encode()),
    ("runs/\udcff", b"runs/\xff"),  # the name of a file that is not UTF-8
    (b"\xff\x00", b"\xff\x00"),
  ):
    files.write_atomically(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == expected
  assert os.listdir(tmp_path) == ["file"]


def test_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("old")

  def raise_disk_full(source, target):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "replace", raise_disk_full)
  with pytest.raises(OSError, match=r"cannot write .*/file: No space left on device\."):
    files.write_atomically(tmp_path / "file", "new")
  assert (tmp_path / "file").read_text() == "old"
  assert os.listdir(tmp_path) == ["file"]


def test_a_directory_is_written_with_all_files(tmp_path):
  (tmp_path / "empty").mkdir()
  for path in (tmp_path / "a" / "b", tmp_path / "empty"):
    files.write_directory(path, {"one": b"1", "two": b""})
    assert sorted(os.listdir(path)) == ["one", "two"]
    assert (path / "one").read_bytes() == b"1"
  assert os.listdir(tmp_path / "a") == ["b"]


def test_a_directory_with_files_is_not_replaced(tmp_path):
  (tmp_path / "file").write_text("old")
  for path in (tmp_path, tmp_path / "file"):
    with pytest.raises(FileExistsError, match=f"{path} exists already: name a new directory"):
      files.write_directory(path, {"one": b"1"})
  assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_leaves_no_directory(tmp_path, monkeypatch):
  def raise_disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(os, "replace", raise_disk_full)
    with pytest.raises(OSError, match=r"cannot write .*/new: No space left on device\."):
      files.write_directory(tmp_path / "new", {"one": b"1"})
  assert os.listdir(tmp_path) == []


def test_unused_path_counts_up(tmp_path):
  path = tmp_path / "sample.txt"
  for name in ("sample.txt", "sample-2.txt", "sample-3.txt"):
    unused = files.unused_path(path)
    assert unused == tmp_path / name
    unused.touch()


def test_a_lock_is_exclusive_and_is_released_when_its_process_ends(tmp_path):
  file = tmp_path / "lock"
  code = (
    "import pathlib, sys\n"
    "from tvq_haiku.utils import files\n"
    f"with files.lock(pathlib.Path({str(file)!r})):\n"
    "  print('locked', flush=True)\n"
    "  sys.stdin.read()\n"
  )
  pipe = subprocess.PIPE
  with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(BlockingIOError):
      with files.lock(file, wait=False):
        pass
    process.kill()
  with files.lock(file, wait=False):
    pass
  with files.lock(file):
    pass


class TestManifest:
  @pytest.fixture
  def directory(self, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    files.write_manifest(tmp_path, "manifest.json")
    return tmp_path

  def test_intact_files_pass(self, directory):
    files.check_manifest(directory, "manifest.json")
    (directory / "new").touch()  # files that are not in the manifest are not checked
    files.check_manifest(directory, "manifest.json")

  def test_format(self, directory):
    expected = '{\n "b": [\n  0,\n  0\n ],\n "sub/a": [\n  3,\n  891568578\n ]\n}'
    assert (directory / "manifest.json").read_text() == expected

  @pytest.mark.parametrize("content", [b"abd", b"ab", b"abcd", b""])
  def test_changed_file_is_named(self, directory, content):
    (directory / "sub" / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"^sub/a has changed\.$"):
      files.check_manifest(directory, "manifest.json")

  def test_missing_file_is_named(self, directory):
    (directory / "b").unlink()
    with pytest.raises(ValueError, match=r"^b is missing\.$"):
      files.check_manifest(directory, "manifest.json")

  def test_a_missing_manifest_is_accepted_and_a_damaged_one_is_rejected(self, directory):
    (directory / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
      files.check_manifest(directory, "manifest.json")
    (directory / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: it is not a JSON object\."):
      files.check_manifest(directory, "manifest.json")
    (directory / "manifest.json").unlink()
    files.check_manifest(directory, "manifest.json")


def test_short_message():
  assert files.short_message(ValueError("\n" + "x" * 300 + "\ny")) == "x" * 200
  assert files.short_message(ValueError("a\nNo space left on device")) == (
    "no space left on the device"
  )


def text_calls_without_encoding(code):
  """Yields the calls in `code` that read or write text in the encoding of the user's locale."""
  for node in ast.walk(ast.parse(code)):
    if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
      continue
    owner, _, name = ast.unparse(node.func).rpartition(".")
    modes = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    is_method = name in ("read_text", "write_text") and owner != "toy_datasets"
    if is_method or (name == "open" and modes & {"r", "w", "a", "x", "r+", "w+"}):
      yield ast.unparse(node)


def test_text_files_are_read_and_written_as_utf8():
  """The encoding of a user's locale may lack characters of the text."""
  code = "f(p.read_text()), open(p, 'w'), p.open('rb'), p.read_text(encoding='utf-8')"
  assert set(text_calls_without_encoding(code)) == {"p.read_text()", "open(p, 'w')"}
  root = pathlib.Path(__file__).parent.parent.parent
  paths = [*(root / "tvq_haiku").rglob("*.py"), *(root / "experiments").rglob("*.py")]
  calls = {str(path): list(text_calls_without_encoding(path.read_text())) for path in paths}
  assert len(calls) > 100 and {path: found for path, found in calls.items() if found} == {}
