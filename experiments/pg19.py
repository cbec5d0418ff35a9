"""Trains the paper's language model on the books of PG-19, and reports the perplexity per word.

python -m experiments.pg19 --data_dir=DIRECTORY --command=train_vocab
python -m experiments.pg19 --data_dir=DIRECTORY                      # train, or resume
python -m experiments.pg19 --data_dir=DIRECTORY --command=test
python -m experiments.pg19 --command=sample --prompt='It was '
python -m experiments.pg19 --smoke                                   # check everything in seconds
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from experiments import cli, specs
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets

_CPU = specs.SizePreset(
  specs.TEXT_CPU.config.replace(n_vocab=4096), specs.TEXT_CPU.train_cfg.replace(n_max_step=2000)
)
_SMOKE = specs.SizePreset(specs.TEXT_SMOKE.config.replace(n_vocab=512), specs.TEXT_SMOKE.train_cfg)

SPEC = specs.ExperimentSpec(
  name="pg19",
  source=data.Books,
  smoke_source=lambda directory: data.Books(toy_datasets.write_books(directory)),
  presets={
    "paper": specs.SizePreset(tvq.TransformerConfig.pg19(), tvq.TrainConfig.pg19()),
    "cpu": _CPU,
    "smoke": _SMOKE,
  },
  measures=("word_perplexity", "bits_per_byte"),
  vocabularies=(specs.SENTENCEPIECE, specs.BYTES),
  top_p=0.8,
)

if __name__ == "__main__":
  cli.launch(SPEC)
