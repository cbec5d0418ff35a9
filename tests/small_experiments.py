"""Experiments on small datasets in the formats of the large ones."""

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.run import trainer

KINDS = ("text", "books", "images")
CONFIG = tvq.TransformerConfig.tiny(
  d_model=16, d_k=8, d_v=16, n_code=6, n_layer=1, block_len=8, mem_len=8
)
TRAIN_CONFIG = tvq.TrainConfig(
  n_warmup_step=1, n_max_step=8, sequence_len=48, update_len=24, global_batch_size=2
)
OPTIONS = trainer.TrainerOptions(validate_every=4, log_every=2)
IMAGE_SIZE = 4


def make_experiment(directory, kind):
  """Returns an experiment of the given kind; all kinds share the token cache in `directory`."""
  settings = dict(
    vocabulary=data.ByteVocabulary,
    config=CONFIG,
    train_cfg=TRAIN_CONFIG,
    workdir=directory / kind,
    cache_dir=directory / "cache",
    token_name="byte",
    eval_rows=3,
    eval_window=32,
  )
  match kind:
    case "text":
      file = toy_datasets.write_text(directory / "source-text", n_byte=3000)
      settings |= dict(source=data.Enwik8(file, n_byte=3000), measures=["bits_per_byte"])
    case "books":
      source = data.Books(toy_datasets.write_books(directory / "source-books", n_byte=700))
      lines = source.sample(10**5, seed=0)
      settings |= dict(
        source=source,
        vocabulary=data.train_pieces(lines, directory / "books.model", size=330),
        config=CONFIG.replace(n_vocab=330),
        measures=["word_perplexity"],
      )
    case "images":
      files = toy_datasets.write_images(directory / "source-images", size=IMAGE_SIZE)
      settings |= dict(
        source=data.DownsampledImages(files, n_train=50, size=IMAGE_SIZE),
        measures=["bits_per_dim"],
        image_size=IMAGE_SIZE,
      )
  return experiment_lib.Experiment(**settings)
