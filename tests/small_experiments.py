"""Experiments on small datasets in the formats of the large ones."""

import jax
import jax.numpy as jnp

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.data import toy_datasets
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.run import run_record, trainer

import helpers

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
    name=f"small-{kind}",
    top_p=0.7,
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


def save_run(directory, kind):
  """Writes a run of the given kind to `directory`, as if it had been trained for 8 updates.

  Its parameters are random.
  """
  config = CONFIG
  if kind == "books":
    words = data.austen()["Emma"][:3000].decode().split()
    vocabulary = data.train_pieces(words, directory / run_directory.VOCABULARY_FILE, size=330)
    config = config.replace(n_vocab=vocabulary.size)
  state = tvq.init_train_state(
    config, TRAIN_CONFIG, jax.random.key(0), helpers.random_params(config)
  )
  state = state._replace(step=jnp.int32(8))
  tvq.save_checkpoint(directory, tvq.Checkpoint(config, TRAIN_CONFIG, state, jax.random.key(1), 4))
  image_size = IMAGE_SIZE if kind == "images" else None
  run_record.write_record(directory, run_record.RunRecord(f"small-{kind}", image_size, 0.7))
  return directory
