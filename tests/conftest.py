import atexit
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

# All processes of a test run share what they compile: workers, and commands started by tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  programs = tempfile.mkdtemp(prefix="programs-")
  atexit.register(shutil.rmtree, programs, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tiny programs cost more to compile than to run. A release that lacks the flag refuses to start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
if "XLA_FLAGS" not in os.environ:
  os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
  if subprocess.run(
    [sys.executable, "-c", "import jax; jax.devices()"], capture_output=True
  ).returncode:
    os.environ["XLA_FLAGS"] = ""

import jax
import pytest

# Tests import their helpers by name; the package itself is the installed one.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

# Whoever starts the tests in the background may have it ignored, and so would commands that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# For tests of meshes.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Each compiled program holds memory maps, of which a process may have 65,530."""
  yield
  jax.clear_caches()
