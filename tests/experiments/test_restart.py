"""The first moments of a command: it restarts once, and Ctrl-C ends it with one line."""

import importlib.machinery
import json
import os
import signal
import sys

import pytest

from experiments import restart

from launching import ROOT, run, workspace

assert workspace  # a fixture

COMMANDS = sorted(
  str(path.relative_to(ROOT))
  for path in (ROOT / "experiments").rglob("*.py")
  if "if __name__ ==" in path.read_text()
)
RESTART = """\
from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported
"""


@pytest.fixture
def restarts(monkeypatch):
  """Makes this process look like a command; returns a list that records calls of `os.execv`."""
  calls = []
  monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments))
  for name in ("signal", "pthread_sigmask"):
    monkeypatch.setattr(restart.signal, name, lambda *arguments: None)
  monkeypatch.setattr(sys, "platform", "linux")
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  set_main_module(monkeypatch, "experiments.text")
  yield calls
  os.environ.pop("GLIBC_TUNABLES", None)


def set_main_module(monkeypatch, name):
  spec = None if name is None else importlib.machinery.ModuleSpec(name, None)
  monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)


def test_command_restarts_once_with_its_arguments_and_the_settings(restarts):
  restart.restart_with_malloc_settings()
  restart.restart_with_malloc_settings()
  assert restarts == [(sys.executable, sys.orig_argv)]
  assert "glibc.malloc.mmap_max=0" in os.environ["GLIBC_TUNABLES"].split(":")


def test_settings_of_the_user_are_kept(restarts, monkeypatch):
  monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
  restart.restart_with_malloc_settings()
  assert not restarts and os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def test_other_systems_do_not_restart(restarts, monkeypatch):
  monkeypatch.setattr(sys, "platform", "darwin")
  restart.restart_with_malloc_settings()
  assert not restarts


@pytest.mark.parametrize("name", [None, "pytest.__main__", "experimentsx.text"])
def test_other_programs_do_not_restart(restarts, monkeypatch, name):
  set_main_module(monkeypatch, name)
  restart.restart_with_malloc_settings()
  assert not restarts


def test_importing_does_not_restart(workspace):
  script = (
    "import importlib.machinery, os, sys;"
    "sys.modules['__main__'].__spec__ = importlib.machinery.ModuleSpec('experiments.text', None);"
    "sys.argv[0] = '-m';"
    "os.execv = lambda *_: os._exit(3);"
    "import experiments, experiments.launcher, experiments.text;"
    "print('GLIBC_TUNABLES' in os.environ)"
  )
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  assert run(f'python -c "{script}"', workspace, env=environment) == (0, "False\n", "")


def run_with_sitecustomize(code, command, workspace, directory):
  """Runs a command that first imports `code`, as Python does with a module `sitecustomize`."""
  (directory / "sitecustomize.py").write_text(code)
  environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  path = os.pathsep.join([str(directory), *environment.get("PYTHONPATH", "").split(os.pathsep)])
  return run(command, workspace, env=environment | {"PYTHONPATH": path})


def test_launched_command_runs_with_the_settings_and_starts_twice(workspace, tmp_path):
  """Uses a `sitecustomize` module to log every start and restart."""
  log = tmp_path / "log"
  code = (
    "import json, os, sys\n"
    "def write(event):\n"
    "  entry = [event, os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.orig_argv]\n"
    f"  with open({str(log)!r}, 'a') as file:\n"
    "    file.write(json.dumps(entry) + '\\n')\n"
    "write('start')\n"
    "execv = os.execv\n"
    "def logged(*arguments):\n"
    "  write('restart' + (' after jax' if 'jax' in sys.modules else ''))\n"
    "  execv(*arguments)\n"
    "os.execv = logged\n"
  )
  command = "python -m experiments.evaluate --workdir=nowhere '--file=README.md'"
  status, out, err = run_with_sitecustomize(code, command, workspace, tmp_path)
  assert (status, out) == (1, "") and "nowhere holds no checkpoint" in err, err
  first, restarted, second = (json.loads(line) for line in log.read_text().splitlines())
  assert [entry[0] for entry in (first, restarted, second)] == ["start", "restart", "start"]
  assert first[1] == restarted[1] == second[1]  # the same process
  assert first[2] is None and "glibc.malloc.mmap_max=0" in second[2]
  assert first[3] == second[3] and second[3][1:] == [
    "-m",
    "experiments.evaluate",
    "--workdir=nowhere",
    "--file=README.md",
  ]


@pytest.mark.parametrize(
  "condition",
  ["'GLIBC_TUNABLES' in os.environ", "name == 'jax'"],
  ids=["during the restart", "while jax is imported"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="commands restart on Linux only")
def test_interrupt_in_the_first_second_ends_with_one_line(workspace, tmp_path, condition):
  """A `sitecustomize` module sends SIGINT at the first import for which the condition is true."""
  code = (
    "import os, signal, sys\n"
    "class Interrupt:\n"
    "  def find_spec(self, name, path=None, target=None):\n"
    f"    if {condition}:\n"
    "      sys.meta_path.remove(self)\n"
    "      os.kill(os.getpid(), signal.SIGINT)\n"
    "sys.meta_path.insert(0, Interrupt())\n"
  )
  command = "python -m experiments.text --command=info"
  assert run_with_sitecustomize(code, command, workspace, tmp_path) == (
    128 + signal.SIGINT,
    "",
    "text: interrupted.\n",
  )


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_restarts_before_its_other_imports(path):
  before, found, _ = (ROOT / path).read_text().partition(RESTART)
  assert found
  lines = [line for line in before.splitlines() if line.startswith(("import ", "from "))]
  assert lines == ["from __future__ import annotations"]
