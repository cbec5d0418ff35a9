"""Evaluates a byte-level model on a file and prints its bits per byte.

python -m experiments.evaluate --checkpoint=runs/quickstart --file=README.md
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

import pathlib

from absl import flags

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku import data

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Directory of the training run.", required=True
)
_FILE = flags.DEFINE_string(
  "file", None, "File to evaluate; its bytes are the tokens.", required=True
)
_ROWS = flags.DEFINE_integer(
  "rows",
  1,
  "Batch size: the file is divided into this many parts, which are read in parallel. A larger "
  "number is faster, but each part starts without context.",
  lower_bound=1,
)


def main() -> None:
  """Prints the bits per byte of --file."""
  text = pathlib.Path(_FILE.value).read_bytes()
  if not text:
    raise ValueError(f"--file={_FILE.value} is empty: there is nothing to evaluate.")
  run = tvq.load_checkpoint(_CHECKPOINT.value)
  data.ByteVocabulary.check(f"--checkpoint={_CHECKPOINT.value}", run.config.n_vocab)
  stream = data.stream_of([data.ByteVocabulary.encode(text)])
  likelihood = tvq.evaluate(
    run.train_state.params, run.config, stream, batch_size=_ROWS.value, show_progress=True
  )
  print(
    f"{likelihood.bits_per(len(text)):.4f} bits per byte over {len(text):,} bytes "
    f"({likelihood.nats_per_token:.4f} nats per token)"
  )


if __name__ == "__main__":
  launcher.launch("evaluate", main)
