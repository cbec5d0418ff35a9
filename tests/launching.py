"""Commands in processes of their own, as a user starts them."""

import pathlib
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A directory with the launchers but not the library: that must be the installed one."""
  directory = tmp_path_factory.mktemp("place")
  for name in ("experiments", "README.md"):
    (directory / name).symlink_to(ROOT / name)
  return directory


def start(command, place, **kwargs):
  arguments = [sys.executable if word == "python" else word for word in shlex.split(command)]
  return subprocess.Popen(
    arguments, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
  )


def run(command, place, **kwargs):
  process = start(command, place, **kwargs)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err
