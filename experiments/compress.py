r"""Compresses a file losslessly with the model of a run, to verify the model's bits per byte.

  python -m experiments.compress --workdir=runs/quickstart README.md
  python -m experiments.compress --workdir=runs/quickstart \
      --decompress README.md.tvqz --output=copy.md

The compressed file does not contain the model. Decompression needs the same checkpoint, the same
versions of JAX and of this library, and the same kind of machine.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

import pathlib

from absl import flags

from experiments import launcher, open_run, shared_flags
import tvq_haiku as tvq
from tvq_haiku.utils import files

shared_flags.define_run_flags()
shared_flags.define_weights_flag()
_DECOMPRESS = flags.DEFINE_boolean(
  "decompress", False, "Decompress FILE instead of compressing it."
)
_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "File to write; it must not exist. Default: FILE.tvqz, or with --decompress FILE without .tvqz.",
)
_ROWS = flags.DEFINE_integer(
  "rows",
  1,
  "Batch size: the file is divided into this many parts, which are compressed in parallel. A "
  "larger number is faster, but each part starts without context.",
  lower_bound=1,
  upper_bound=65_535,
)

_SUFFIX = ".tvqz"


def main(file: str) -> None:
  """Compresses or decompresses `file` and prints the sizes of input and output."""
  output = _output_path(file, _OUTPUT.value, decompress=_DECOMPRESS.value)
  try:
    content = pathlib.Path(file).read_bytes()
  except OSError as error:
    raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
  if output.exists():
    raise ValueError(f"{output} exists already: remove it, or set a different --output.")
  files.prepare_directory(output.absolute().parent)
  model = open_run.open_run(flags.FLAGS.workdir, weights=flags.FLAGS.weights).model
  if _DECOMPRESS.value:
    try:
      result = model.decompress(content, show_progress=True)
    except tvq.CompressionError as error:
      raise ValueError(f"{file}: {error}") from error
  else:
    result = model.compress(content, rows=_ROWS.value, show_progress=True)
  files.write_atomically(output, result)
  rate = ""
  if content and not _DECOMPRESS.value:
    rate = f", {8 * len(result) / len(content):.4f} bits per byte"
  print(f"{output}: {len(result):,} bytes, from {len(content):,}{rate}")


def _output_path(file: str, output: str | None, *, decompress: bool) -> pathlib.Path:
  """Returns the file to write: `output`, or by default `file` with or without the suffix."""
  if output is not None:
    return pathlib.Path(output)
  if not decompress:
    return pathlib.Path(file + _SUFFIX)
  if not file.endswith(_SUFFIX):
    raise ValueError(f"{file} does not end in {_SUFFIX}: name the file to write with --output.")
  return pathlib.Path(file.removesuffix(_SUFFIX))


if __name__ == "__main__":
  launcher.launch("compress", main, argument="FILE")
