"""Restarts a command with memory settings that only take effect when a process starts.

This module imports nothing but the standard library: a command calls it before it imports JAX, so
that JAX is imported once and not twice.
"""

from __future__ import annotations

import os
import sys

# The temporary arrays of a training step take hundreds of megabytes. By default, malloc returns
# them to the system after each step and requests them again, page by page, in the next one. These
# settings keep the memory in the process; training on a CPU is then a fifth faster.
_MALLOC_SETTINGS = ("hugetlb=1", "mmap_max=0", "arena_max=1", f"trim_threshold={2**46}")


def restart_with_malloc_settings() -> None:
  """Replaces this process by the same command with `GLIBC_TUNABLES` set.

  The process id, the arguments, the other environment variables and the open files stay the same,
  so the caller sees the same standard input, standard output and exit status. The restarted program
  finds the variable set and therefore does not restart again.

  Does nothing on systems other than Linux, if the caller has set `GLIBC_TUNABLES`, and in
  processes that were not started by `python -m experiments.NAME`, such as tests.
  """
  spec = sys.modules["__main__"].__spec__  # None unless Python was started with -m
  is_command = spec is not None and spec.name.startswith("experiments.")
  if sys.platform != "linux" or not is_command or "GLIBC_TUNABLES" in os.environ:
    return
  settings = ":".join(f"glibc.malloc.{setting}" for setting in _MALLOC_SETTINGS)
  os.environ["GLIBC_TUNABLES"] = settings
  os.execv(sys.executable, sys.orig_argv)
