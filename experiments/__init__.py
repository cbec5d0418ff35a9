"""Launchers: each is a command, `python -m experiments.NAME`."""

import os
import sys

# A step's temporaries are hundreds of megabytes, which malloc gives back to the system and takes
# again, page by page, for every step. It reads its settings when the process starts, so start
# again with settings that keep the memory: a fifth faster on a CPU. While Python looks for the
# module to run, argv[0] is "-m"; an import from elsewhere changes nothing.
if sys.platform == "linux" and sys.argv[0] == "-m" and "GLIBC_TUNABLES" not in os.environ:
  os.environ["GLIBC_TUNABLES"] = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("hugetlb=1", "mmap_max=0", "arena_max=1", f"trim_threshold={2**46}")
  )
  os.execv(sys.executable, sys.orig_argv)
