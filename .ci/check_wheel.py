"""Checks an installed wheel: it holds every file of the package, and a small example runs.

PYTHONPATH=DIRECTORY_OF_THE_WHEEL python .ci/check_wheel.py CHECKOUT
"""

import pathlib
import sys

import jax
import numpy as np

import tvq_haiku as tvq
from tvq_haiku import data


def files_of(package):
  """Returns the relative paths of the files of a package, except compiled and hidden files."""
  paths = (path.relative_to(package) for path in package.rglob("*") if path.is_file())
  ignored = ("__pycache__", ".")
  return {str(path) for path in paths if not any(part.startswith(ignored) for part in path.parts)}


installed = pathlib.Path(tvq.__file__).resolve().parent
checkout = pathlib.Path(sys.argv[1]).resolve() / "tvq_haiku"
if installed == checkout:
  sys.exit(f"check_wheel: {installed} is the checkout, not an installed wheel.")
if missing := files_of(checkout) - files_of(installed):
  sys.exit(f"check_wheel: the wheel lacks {sorted(missing)}.")
if not {"py.typed", "data/austen.tar.xz"} <= files_of(installed):
  sys.exit("check_wheel: the wheel has no type information or no novels.")

config = tvq.TransformerConfig.tiny(n_layer=1)
params = tvq.make_transformer(config).init(jax.random.key(0), np.ones((1, 1), np.int32))
novel = data.ByteVocabulary.encode(data.austen()["Emma"][:20])
out = tvq.generate(params, config, novel[None], max_new_tokens=4, rng=jax.random.key(1))
if out.tokens.shape != (1, 4):
  sys.exit(f"check_wheel: generate returned tokens of shape {out.tokens.shape}.")
print(f"check_wheel: {installed} is complete, and generates text.")
