"""Atomic writes, locks and manifests."""

import errno
import os
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
  for content, expected in (("häuser\n", "häuser\n".encode()), (b"\xff\x00", b"\xff\x00")):
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
