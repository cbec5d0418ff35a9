"""Bits per byte of a file under a checkpoint.

python -m experiments.evaluate --checkpoint=runs/quickstart --file=README.md
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku import data

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a run.", required=True)
_FILE = flags.DEFINE_string("file", None, "What to read, as bytes.", required=True)
_ROWS = flags.DEFINE_integer(
  "rows", 1, "Pieces read side by side; more are faster, with less context.", lower_bound=1
)


def main() -> None:
  text = pathlib.Path(_FILE.value).read_bytes()
  if not text:
    raise ValueError(f"--file={_FILE.value} is empty: there is nothing to evaluate.")
  run = tvq.load_checkpoint(_CHECKPOINT.value)
  data.ByteVocabulary.check(f"--checkpoint={_CHECKPOINT.value}", run.config.n_vocab)
  stream = data.stream_of([data.ByteVocabulary.encode(text)])
  likelihood = tvq.evaluate(
    run.config, run.train_state.params, stream, batch_size=_ROWS.value, show_progress=True
  )
  print(
    f"{likelihood.bits_per(len(text)):.4f} bits per byte over {len(text):,} bytes "
    f"({likelihood.nats_per_token:.4f} nats per token)"
  )


if __name__ == "__main__":
  launcher.launch("evaluate", main)
