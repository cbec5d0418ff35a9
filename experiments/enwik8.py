"""The paper's byte-level model of Wikipedia, from the raw file to bits per byte.

python -m experiments.enwik8 --data_dir=DIRECTORY                    # trains, or goes on
python -m experiments.enwik8 --data_dir=DIRECTORY --command=test
python -m experiments.enwik8 --command=sample
python -m experiments.enwik8 --smoke                                 # the path, in seconds
"""

from __future__ import annotations

from absl import flags

from experiments import cli
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets

_N_BYTE = flags.DEFINE_integer(
  "n_byte",
  100_000_000,
  "What the size of the file must be; another one for another dump.",
  lower_bound=20,
)

_SMOKE_BYTES = 60_000

flags.adopt_module_key_flags(cli)  # so that --help lists them

if __name__ == "__main__":
  cli.launch(
    cli.ExperimentSpec(
      name="enwik8",
      source=lambda data_dir: data.Enwik8(data_dir, n_byte=_N_BYTE.value),
      smoke_source=lambda place: data.Enwik8(
        toy_datasets.write_text(place, n_byte=_SMOKE_BYTES), n_byte=_SMOKE_BYTES
      ),
      sizes={
        "paper": cli.SizePreset(tvq.TransformerConfig.enwik8(), tvq.TrainConfig.enwik8()),
        "cpu": cli.TEXT_CPU,
        "smoke": cli.TEXT_SMOKE,
      },
      measures=("bits_per_byte",),
    )
  )
