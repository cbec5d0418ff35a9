"""Prepares the process of a command: the reaction to Ctrl-C, and memory settings.

This module imports nothing but the standard library: a command calls it before it imports JAX, so
that JAX is imported once and not twice, and Ctrl-C ends the imports without a traceback.
"""

from __future__ import annotations

# The module `signal` imports other modules. This takes so long that Ctrl-C may interrupt it, which
# would print a traceback.
import _signal as signal
import os
import sys

# The temporary arrays of a training step take hundreds of megabytes. By default, malloc returns
# them to the system after each step and requests them again, page by page, in the next one. These
# settings keep the memory in the process; training on a CPU is then a fifth faster.
_MALLOC_SETTINGS = ("hugetlb=1", "mmap_max=0", "arena_max=1", f"trim_threshold={2**46}")


def restart_with_malloc_settings() -> None:
  """Makes Ctrl-C end this process with one line, and restarts it with `GLIBC_TUNABLES` set.

  The restart replaces the process by the same command. The process id, the arguments, the other
  environment variables and the open files stay the same, so the caller sees the same standard
  input, standard output and exit status. The restarted program finds the variable set and therefore
  does not restart again. A Ctrl-C during the restart takes effect after it.

  Does not restart on systems other than Linux, or if the caller has set `GLIBC_TUNABLES`. Does
  nothing in processes that were not started by `python -m experiments.NAME`, such as tests.
  """
  spec = sys.modules["__main__"].__spec__  # None unless Python was started with -m
  if spec is None or not spec.name.startswith("experiments."):
    return
  _end_on_interrupt(spec.name.rpartition(".")[2])
  if sys.platform != "linux":
    return
  if "GLIBC_TUNABLES" in os.environ:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked before the restart
    return
  settings = ":".join(f"glibc.malloc.{setting}" for setting in _MALLOC_SETTINGS)
  os.environ["GLIBC_TUNABLES"] = settings
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  os.execv(sys.executable, sys.orig_argv)


def _end_on_interrupt(name: str) -> None:
  """Makes Ctrl-C end the process with the same message and exit status as in `launcher`.

  Args:
    name: name of the command.
  """

  def end(number: int, frame: object) -> None:
    del frame
    os.write(2, f"{name}: interrupted.\n".encode())
    os._exit(128 + number)

  signal.signal(signal.SIGINT, end)
