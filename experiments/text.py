"""A model of any text file, or directory of text files, of your own.

The last 10 % of the bytes, in the order of the files' names, are for validation and the test; or
directories train, validation and test are the splits.

  python -m experiments.text --size=cpu --data_dir=FILE
  python -m experiments.text --size=cpu --data_dir=FILE --command=test
  python -m experiments.text --size=cpu --command=sample --prompt='Once '

Tokens are bytes, or pieces of words: --vocab=NEW.model --command=train_vocab --config.n_vocab=4096.
"""

from __future__ import annotations

from absl import flags

from experiments import cli
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets

flags.adopt_module_key_flags(cli)  # so that --help lists them

if __name__ == "__main__":
  cli.launch(
    cli.ExperimentSpec(
      name="text",
      source=data.TextFiles,
      smoke_source=lambda place: data.TextFiles(toy_datasets.write_text(place, name="text.txt")),
      sizes={
        "paper": cli.SizePreset(tvq.TransformerConfig.enwik8(), tvq.TrainConfig.enwik8()),
        "cpu": cli.TEXT_CPU,
        "smoke": cli.TEXT_SMOKE,
      },
      measures=("bits_per_byte",),
      vocabularies=("bytes", "pieces"),
    )
  )
