"""Derives command lines from that of this process, for messages that name a command to run next."""

from __future__ import annotations

import os
import shlex
import sys

from absl import flags

# Flags that `other_command` leaves out.
TRAINING_ONLY = ("command", "init", "mesh", "multihost", "coordinator", "n_process", "process")


def resume_command(*, multihost: bool = False) -> str:
  """Returns the command that started this process.

  Args:
    multihost: whether other processes must be started, too.
  """
  line = _python_command(sys.argv[1:])
  if devices := os.environ.get("JAX_NUM_CPU_DEVICES"):
    line = f"JAX_NUM_CPU_DEVICES={devices} {line}"
  return f"{line} (and the other processes)" if multihost else line


def other_command(command: str) -> str:
  """Returns the command that runs `--command=command` on the run of this process.

  Args:
    command: a value of --command.

  Returns:
    The command line of this process with the new --command, without the flags in TRAINING_ONLY.
  """
  kept = [
    word
    for name, words in _split_by_flag(sys.argv[1:])
    if name not in TRAINING_ONLY
    for word in words
  ]
  return _python_command([*kept, f"--command={command}"])


def _python_command(arguments: list[str]) -> str:
  return shlex.join(["python", "-m", sys.modules["__main__"].__spec__.name, *arguments])


def _split_by_flag(arguments: list[str]) -> list[tuple[str, list[str]]]:
  """Returns pairs of a flag's name and its words: one for --flag=value, two for --flag value."""
  pairs, rest = [], list(arguments)
  while rest:
    words = [rest.pop(0)]
    name, equals, _ = words[0].lstrip("-").partition("=")
    if not equals and rest and name in flags.FLAGS and not flags.FLAGS[name].boolean:
      words.append(rest.pop(0))
    pairs.append((name, words))
  return pairs
