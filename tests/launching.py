"""Starts commands as subprocesses, as a user does."""

import pathlib
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def make_workspace(directory):
  """Links the commands and the README into `directory`, but not the library.

  So commands that are started there import the installed library.
  """
  for name in ("experiments", "README.md"):
    (directory / name).symlink_to(ROOT / name)
  return directory


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
  """A directory to start commands in, which the tests of a module share."""
  return make_workspace(tmp_path_factory.mktemp("workspace"))


def start(command, directory, **kwargs):
  """Starts `command` in `directory`, with pipes for output (stdout) and messages (stderr)."""
  arguments = [sys.executable if word == "python" else word for word in shlex.split(command)]
  return subprocess.Popen(
    arguments, cwd=directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
  )


def run(command, directory, **kwargs):
  """Runs `command` in `directory`; returns exit status, output (stdout) and messages (stderr)."""
  process = start(command, directory, **kwargs)
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def assert_fails_in_one_line(command, directory, status, message):
  """Runs `command` and checks its exit status, and that it prints one line with `message`."""
  actual_status, out, err = run(f"python -m experiments.{command}", directory)
  assert actual_status == status, err
  assert message in err, err
  assert len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
  assert not out
