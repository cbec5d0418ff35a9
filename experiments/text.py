"""Trains a language model on a text file, or on a directory of text files.

  python -m experiments.text --data_dir=FILE
  python -m experiments.text --data_dir=FILE --command=test
  python -m experiments.text --data_dir=FILE --command=sample --prompt='Once '

The model is small; --size=paper selects the paper's. The run is in runs/text-NAME-cpu, where NAME
is the name of the data.

Directories named train, validation and test hold the three splits. Without them, the files are
concatenated in the order of their names: the first 90 % of the bytes are the training split, and
the next two parts of 5 % are the validation and the test split.

A token is a byte. For SentencePiece tokens, first train a vocabulary with --command=train_vocab
--vocab=NEW.model --config.n_vocab=4096, and then pass the last two flags to every command.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from experiments import cli, specs
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets

SPEC = specs.ExperimentSpec(
  name="text",
  source=data.TextFiles,
  smoke_source=lambda directory: data.TextFiles(
    toy_datasets.write_text(directory, name="text.txt")
  ),
  presets={
    "paper": specs.SizePreset(tvq.TransformerConfig.enwik8(), tvq.TrainConfig.enwik8()),
    "cpu": specs.TEXT_CPU,
    "smoke": specs.TEXT_SMOKE,
  },
  measures=("bits_per_byte",),
  vocabularies=(specs.BYTES, specs.SENTENCEPIECE),
  default_size="cpu",
  names_data=True,
)

if __name__ == "__main__":
  cli.launch(SPEC)
