import pathlib
import sys

import jax

# Tests import their helpers by name; the package itself is the installed one.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

# Tiny programs cost more to compile than to run.
jax.config.update("jax_disable_most_optimizations", True)
