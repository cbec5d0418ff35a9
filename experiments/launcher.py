"""How every experiment starts: flags in, one clear line out when something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import os
import signal
import sys
import threading
import traceback

from absl import app, flags, logging

from tvq_haiku.parallel import multihost

EXIT_BAD_INPUT = 1
EXIT_BAD_FLAGS = 2


def launch(name: str, main: Callable[..., None], *, argument: str | None = None) -> None:
  """Parses the flags and runs `main`.

  Exits with 2 for wrong flags and with 1 for wrong input (a file, a size, a checkpoint, a missing
  package); either is one line on standard error that begins with `name`. A reader of standard
  output that goes away ends the command without a word.

  Args:
    name: of the command.
    main: what it does.
    argument: what the one argument is called that is not a flag, and that `main` gets; None: there
      is none.
  """
  expected = [] if argument is None else [argument]

  def fail(message: object, status: int) -> None:
    line = " ".join(str(message).split())
    print(f"{name}: {line}", file=sys.stderr, flush=True)
    if multihost.is_initialized():  # a clean end would wait for processes that wait for this one
      sys.stdout.flush()
      os._exit(status)
    sys.exit(status)

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      return fail(error, EXIT_BAD_FLAGS)

  def guarded(argv: Sequence[str]) -> None:
    if len(argv) > 1 + len(expected):
      fail(f"unexpected argument {argv[1 + len(expected)]!r}; see --help.", EXIT_BAD_FLAGS)
    if len(argv) < 1 + len(expected):
      fail(f"{argument} is missing; see --help.", EXIT_BAD_FLAGS)
    if not flags.FLAGS["verbosity"].present:
      # Orbax narrates every save, and what fails in its threads is raised here again.
      logging.set_verbosity(logging.FATAL)
      threading.excepthook = sys.unraisablehook = lambda _: None
    try:
      main(*argv[1:])
      sys.stdout.flush()
    except KeyboardInterrupt:
      print(f"{name}: interrupted.", file=sys.stderr, flush=True)
      # At once: threads that still compile may crash in an interpreter that shuts down.
      os._exit(128 + signal.SIGINT)
    except BrokenPipeError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
      sys.exit(128 + signal.SIGPIPE)
    except flags.Error as error:
      fail(error, EXIT_BAD_FLAGS)
    except Exception as error:
      if multihost.is_peer_failure(error):
        error = OSError(
          "stopped, because another process of this run stopped or cannot be reached "
          f"({str(error)[:300]}). The last checkpoint is complete: restart all processes to resume."
        )
      if isinstance(error, (ArithmeticError, ImportError, OSError, ValueError)):
        fail(error, EXIT_BAD_INPUT)
      if not multihost.is_initialized():
        raise
      # At once: a normal exit would wait for processes that wait for this one.
      traceback.print_exc()
      os._exit(EXIT_BAD_INPUT)

  app.run(guarded, flags_parser=parse)


def parse_positive(name: str, text: str) -> int:
  """One entry of a list flag as a number, at least 1."""
  if not text.strip().isdigit() or int(text) < 1:
    raise ValueError(f"--{name}: {text!r} must be a whole number, at least 1.")
  return int(text)
