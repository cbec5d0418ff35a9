"""JAX settings for all tests; some of them must be set before JAX is imported."""

import atexit
import gc
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

# The pytest workers and the commands that tests start share one cache of compiled programs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  cache = tempfile.mkdtemp(prefix="compiled-programs-")
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tiny programs take longer to compile than to run. Without fusion emitters, they compile in half
# the time; without splitting, in four fifths. JAX fails to start if its release does not know an
# XLA flag, so the flags are first tried in a separate process.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
if "XLA_FLAGS" not in os.environ:
  os.environ["XLA_FLAGS"] = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  )
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  if subprocess.run(command, capture_output=True).returncode:
    os.environ["XLA_FLAGS"] = ""

import jax
import pytest

# Test files import the helper modules of this folder by name, and `experiments` from the checkout.
# The checkout comes last on the path, so that `tvq_haiku` is the installed package.
sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.append(str(pathlib.Path(__file__).parent.parent))

# A shell that starts pytest in the background may make it ignore SIGINT. The commands that tests
# start would inherit this, but some tests interrupt them by SIGINT.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# Tracing makes many objects that live long, which the default thresholds examine again and again.
gc.set_threshold(100_000, 50, 100)

jax.config.update("jax_num_cpu_devices", 8)  # for tests on meshes


@pytest.fixture(autouse=True, scope="module")
def clear_compiled_programs():
  """Frees compiled programs: they use memory maps, of which Linux allows a process 65,530."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
  """A vocabulary of 400 SentencePiece tokens, 256 of which are bytes."""
  from tvq_haiku import data

  lines = data.austen()["Emma"][:20_000].decode().split("\n")
  file = tmp_path_factory.mktemp("pieces") / "vocab.model"
  return data.train_pieces(filter(None, lines), file, size=400)
