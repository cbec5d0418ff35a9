"""Compresses a file with a model, losslessly: the proof that its bits per byte are real.

  python -m experiments.compress --checkpoint=runs/quickstart README.md
  python -m experiments.compress --checkpoint=runs/quickstart --decompress README.md.tvqz --output=copy.md

The model itself is not in the compressed file. To read it back takes the same checkpoint, the same
versions of jax and this library, and a machine of the same kind.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku.utils import files

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a run.", required=True)
_DECOMPRESS = flags.DEFINE_boolean("decompress", False, "Turn a compressed file back.")
_OUTPUT = flags.DEFINE_string(
  "output", None, "File to write, which must not exist; default: FILE.tvqz, or FILE without it."
)
_ROWS = flags.DEFINE_integer(
  "rows",
  1,
  "Pieces read side by side; more are faster, with less context.",
  lower_bound=1,
  upper_bound=65_535,
)

_SUFFIX = ".tvqz"


def main(file: str) -> None:
  name = _OUTPUT.value
  if name is None and _DECOMPRESS.value and not file.endswith(_SUFFIX):
    raise ValueError(f"{file} does not end in {_SUFFIX}: name the --output.")
  name = name or (file.removesuffix(_SUFFIX) if _DECOMPRESS.value else file + _SUFFIX)
  content = pathlib.Path(file).read_bytes()
  output = pathlib.Path(name)
  if output.exists():
    raise ValueError(f"{output} exists already: remove it, or name another --output.")
  files.prepare_directory(output.absolute().parent)
  run = tvq.load_checkpoint(_CHECKPOINT.value)
  model = (run.train_state.params, run.config)
  if _DECOMPRESS.value:
    try:
      result = tvq.decompress(*model, content, show_progress=True)
    except tvq.CompressionError as error:
      raise ValueError(f"{file}: {error}") from error
  else:
    result = tvq.compress(*model, content, rows=_ROWS.value, show_progress=True)
  files.write_atomically(output, result)
  note = ""
  if content and not _DECOMPRESS.value:
    note = f", {8 * len(result) / len(content):.4f} bits per byte"
  print(f"{output}: {len(result):,} bytes, from {len(content):,}{note}")


if __name__ == "__main__":
  launcher.launch("compress", main, argument="FILE")
