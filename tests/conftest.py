import pathlib
import sys

import jax
import pytest

# Tests import their helpers by name; the package itself is the installed one.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

# Tiny programs cost more to compile than to run.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Each compiled program holds memory maps, of which a process may have 65,530."""
  yield
  jax.clear_caches()
