"""The paper's model of books, from their texts to the perplexity of words.

python -m experiments.pg19 --data_dir=DIRECTORY --command=train_vocab
python -m experiments.pg19 --data_dir=DIRECTORY                      # trains, or goes on
python -m experiments.pg19 --data_dir=DIRECTORY --command=test
python -m experiments.pg19 --command=sample --prompt='It was '
python -m experiments.pg19 --smoke                                   # the path, in seconds
"""

from __future__ import annotations

from absl import flags

from experiments import cli
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets

_CPU = cli.SizePreset(
  cli.TEXT_CPU.config.replace(n_vocab=4096), cli.TEXT_CPU.train_cfg.replace(n_max_step=2000)
)
_SMOKE = cli.SizePreset(cli.TEXT_SMOKE.config.replace(n_vocab=512), cli.TEXT_SMOKE.train_cfg)

flags.adopt_module_key_flags(cli)  # so that --help lists them

if __name__ == "__main__":
  cli.launch(
    cli.ExperimentSpec(
      name="pg19",
      source=data.Books,
      smoke_source=lambda place: data.Books(toy_datasets.write_books(place)),
      sizes={
        "paper": cli.SizePreset(tvq.TransformerConfig.pg19(), tvq.TrainConfig.pg19()),
        "cpu": _CPU,
        "smoke": _SMOKE,
      },
      measures=("word_perplexity", "bits_per_byte"),
      vocabularies=("pieces", "bytes"),
    )
  )
