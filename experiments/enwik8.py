"""Trains the paper's byte-level language model on enwik8, and reports bits per byte.

python -m experiments.enwik8 --data_dir=DIRECTORY                    # train, or resume
python -m experiments.enwik8 --data_dir=DIRECTORY --command=test
python -m experiments.enwik8 --command=sample
python -m experiments.enwik8 --smoke                                 # check everything in seconds
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from absl import flags

from experiments import cli, specs
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets

_N_BYTE = flags.DEFINE_integer(
  "n_byte",
  100_000_000,
  "Expected size of the file in bytes; set it to use a different Wikipedia dump.",
  lower_bound=20,
)

_SMOKE_BYTES = 60_000

SPEC = specs.ExperimentSpec(
  name="enwik8",
  source=lambda data_dir: data.Enwik8(data_dir, n_byte=_N_BYTE.value),
  smoke_source=lambda directory: data.Enwik8(
    toy_datasets.write_text(directory, n_byte=_SMOKE_BYTES), n_byte=_SMOKE_BYTES
  ),
  presets={
    "paper": specs.SizePreset(tvq.TransformerConfig.enwik8(), tvq.TrainConfig.enwik8()),
    "cpu": specs.TEXT_CPU,
    "smoke": specs.TEXT_SMOKE,
  },
  measures=("bits_per_byte",),
  top_p=0.9,
)

if __name__ == "__main__":
  cli.launch(SPEC)
