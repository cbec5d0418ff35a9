"""Command lines that messages tell the user to run next."""

import importlib.machinery
import sys

from absl import flags
import pytest

from experiments import command_line, run_flags

assert run_flags  # defines the flags


@pytest.fixture
def started_as(monkeypatch):
  """Returns a function that makes this process look as if it was started with given arguments."""

  def pretend(*arguments):
    spec = importlib.machinery.ModuleSpec("experiments.pg19", None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["pg19.py", *arguments])

  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  return pretend


def test_resuming_repeats_all_arguments_quoted(started_as):
  started_as("--smoke", "--workdir=a run")
  assert command_line.resume_command() == "python -m experiments.pg19 --smoke '--workdir=a run'"


def test_resuming_keeps_the_number_of_devices_and_mentions_other_processes(started_as, monkeypatch):
  started_as("--mesh=data:4")
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")
  command = "JAX_NUM_CPU_DEVICES=4 python -m experiments.pg19 --mesh=data:4"
  assert command_line.resume_command() == command
  assert command_line.resume_command(multihost=True) == command + " (and the other processes)"


def test_other_commands_leave_out_the_flags_of_training(started_as):
  started_as(
    "--mesh=data:4", "--init", "x.safetensors", "--smoke", "--workdir", "w", "--command=train"
  )
  assert command_line.other_command("test") == (
    "python -m experiments.pg19 --smoke --workdir w --command=test"
  )


def test_training_only_flags_exist():
  assert set(command_line.TRAINING_ONLY) <= set(flags.FLAGS)
