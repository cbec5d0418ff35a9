"""The README: its examples run, the files that it names exist, and its beginning is brief."""

import os
import re

import pytest

from launching import ROOT, run, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow


def readme_blocks(language):
  """Returns the code blocks of the README in `language`."""
  return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def test_python_examples_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # the examples write files
  script = "".join(readme_blocks("python"))
  namespace = {}
  exec(compile(script, "README.md", "exec"), namespace)
  assert namespace["logprobs"].shape == (2, 100, 259)
  assert namespace["metrics"]["loss_lm"].shape == (2,)


def test_commands_run(quickstart, workspace):
  commands = [
    command.strip()
    for block in readme_blocks("sh")
    for line in block.splitlines()
    for command in line.split("&&")
  ]
  assert commands[:2] == ["pip install -e '.[train]'", "python -m experiments.quickstart"]
  for command in commands:
    if command.startswith("pip install -e '.[test]'") or command.startswith("pytest"):
      continue  # these commands started this test
    if command.startswith("pip install -e '.[train]'"):
      assert "train =" in (ROOT / "setup.cfg").read_text()
      continue
    variables, command = re.match(r"((?:[A-Z_]+=\S+ )*)(.*)", command).groups()
    assert command.startswith("python -m experiments."), command
    if "quickstart" in command.split("--")[0]:
      command += " --smoke --workdir=runs/quickstart"
    if "experiments.text" in command:
      command += " --cache_dir=cache"
      if "--command" not in command:
        command += " --config.n_max_step=8 --config.n_warmup_step=2"
        if "--config.n_extra_step" in command:
          command += " --config.n_extra_step=4"
        if "--init" not in command:
          command += " --config.d_model=32 --config.d_v=32"
    environment = os.environ | dict(variable.split("=") for variable in variables.split())
    status, out, err = run(command, workspace, env=environment)
    assert status == 0 and out.strip(), (command, err)
  assert (workspace / "copy.md").read_bytes() == (ROOT / "README.md").read_bytes()


def test_installation_and_first_example_are_brief():
  lines = (ROOT / "README.md").read_text().splitlines()
  assert any(line.startswith("pip install") for line in lines[:25])
  assert len([line for line in readme_blocks("python")[0].splitlines() if line]) <= 15


def test_named_files_exist():
  """Checks the paths that the README names, and the files that its table of folders names."""
  text = (ROOT / "README.md").read_text()
  for path in re.findall(r"`((?:tvq_haiku|experiments|tests)/[\w/]*(?:\.py)?)`", text):
    assert (ROOT / path).exists(), path
  rows = re.findall(r"^\| (`tvq_haiku/.*?)\| (.*) \|$", text, re.M)
  assert len(rows) >= 10
  for folders, files in rows:
    names = [name for name in re.findall(r"`(\w+\.py|\w+/)`", files)]
    for name in names:
      folders_of_row = [ROOT / folder for folder in re.findall(r"`(.*?)`", folders)]
      assert any((folder / name).exists() for folder in folders_of_row), (folders, name)
