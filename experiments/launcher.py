"""Runs a command: parses its flags, and reports each expected error in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import os
import re
import signal
import sys
import traceback
from typing import NoReturn

from absl import app, flags

from experiments import console, quiet
from tvq_haiku.parallel import multihost
from tvq_haiku.run import stop_signals

EXIT_BAD_INPUT = 1
EXIT_BAD_FLAGS = 2

_MISSING_FLAG = re.compile(r"Flag (--\w+) must have a value other than None")  # absl's message


def launch(name: str, main: Callable[..., None], *, argument: str | None = None) -> None:
  """Parses the flags and runs `main`.

  Expected errors end the process with one line on standard error that begins with `name`:
  - wrong flags: exit status 2;
  - wrong input (a file, a size, a checkpoint, a missing package), a full disk, too little memory,
    or the failure of another process of the same run: exit status 1.
  Other errors are bugs and are shown with their traceback. Ctrl-C ends with one line and status
  130, also while a program is compiled. If the reader of standard output closes it, the command
  ends silently with status 141.

  Args:
    name: name of the command.
    main: function to run. It is called with the positional argument, if there is one.
    argument: name of the positional argument, for messages. None: the command takes none.
  """
  console.replace_unprintable(name)
  app.run(
    functools.partial(_run, name, main, argument),
    flags_parser=functools.partial(_parse_flags, name),
  )


def parse_positive(name: str, text: str) -> int:
  """Returns one entry of a list flag as an integer of at least 1.

  Args:
    name: name of the flag, for the message.
    text: the entry.

  Raises:
    ValueError: the entry is not an integer, or less than 1.
  """
  if not text.strip().isdigit() or int(text) < 1:
    raise ValueError(f"--{name}: {text!r} must be an integer of at least 1.")
  return int(text)


def _parse_flags(name: str, argv: Sequence[str]) -> list[str]:
  """Returns the positional arguments, after the name of the program."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    missing = _MISSING_FLAG.search(str(error))
    _fail(name, f"{missing[1]} is missing; see --help." if missing else str(error), EXIT_BAD_FLAGS)


def _run(name: str, main: Callable[..., None], argument: str | None, argv: Sequence[str]) -> None:
  """Runs `main` with the positional arguments; reports expected errors in one line."""
  n_expected = 0 if argument is None else 1
  if len(argv) > 1 + n_expected:
    _fail(name, f"unexpected argument {argv[1 + n_expected]!r}; see --help.", EXIT_BAD_FLAGS)
  if len(argv) < 1 + n_expected:
    _fail(name, f"{argument} is missing; see --help.", EXIT_BAD_FLAGS)
  if not flags.FLAGS["verbosity"].present:
    quiet.hide_checkpoint_messages()
  interruption = stop_signals.Interruption(f"{name}: interrupted.")
  try:
    with interruption.watch():
      main(*argv[1:])
      sys.stdout.flush()
  except KeyboardInterrupt:
    interruption.announce()
    # Exits without cleaning up: threads that still compile may crash during a normal exit.
    os._exit(128 + signal.SIGINT)
  except BrokenPipeError:
    # Python flushes standard output again when it exits; on /dev/null, this flush cannot fail.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
  except flags.Error as error:
    _fail(name, str(error), EXIT_BAD_FLAGS)
  except Exception as error:
    _report_error(name, error)


def _report_error(name: str, error: Exception) -> None:
  """Ends the process: with one line if the error is expected, with the traceback if it is a bug."""
  message = _describe_expected(error)
  if message is not None:
    _fail(name, message, EXIT_BAD_INPUT)
  if not multihost.is_initialized():
    raise error
  # A normal exit would wait for the other processes, which may wait for this one.
  traceback.print_exception(error)
  os._exit(EXIT_BAD_INPUT)


def _describe_expected(error: Exception) -> str | None:
  """Returns the message for an expected error, or None if the error is a bug."""
  if _is_out_of_memory(error):
    return (
      f"out of memory ({_shorten(error)}). Use a smaller model or batch, or a device with more "
      "memory."
    )
  if multihost.is_peer_failure(error):
    return (
      "stopped, because another process of this run stopped or cannot be reached "
      f"({_shorten(error)}). The last checkpoint is complete: restart all processes to resume."
    )
  if isinstance(error, (ArithmeticError, ImportError, OSError, ValueError)):
    return str(error)
  return None


def _is_out_of_memory(error: Exception) -> bool:
  """Returns whether memory of the host or of a device is exhausted; JAX has no type for that."""
  return isinstance(error, MemoryError) or (
    isinstance(error, RuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED")
  )


def _shorten(error: Exception) -> str:
  return " ".join(str(error).split())[:300] or type(error).__name__


def _fail(name: str, message: str, status: int) -> NoReturn:
  """Ends the process with `status`, and with one line on standard error."""
  line = " ".join(message.split())
  print(f"{name}: {line}", file=sys.stderr, flush=True)
  if multihost.is_initialized():
    # A normal exit would wait for the other processes, which may wait for this one.
    sys.stdout.flush()
    os._exit(status)
  sys.exit(status)
