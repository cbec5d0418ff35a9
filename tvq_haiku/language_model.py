"""A trained model of text with its vocabulary: one object that continues, scores and compresses.

It holds parameters, configuration and vocabulary, which are checked once. `load` reads it from the
directory of a training run or from exported parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import os
import pathlib
from typing import Any

import jax

from tvq_haiku.checkpoint import checkpoints, export, run_directory
from tvq_haiku.config import TransformerConfig
from tvq_haiku.data import vocabulary as vocabulary_lib
from tvq_haiku.data.sentencepiece_vocabulary import PieceVocabulary
from tvq_haiku.data.vocabulary import ByteVocabulary, Vocabulary
from tvq_haiku.evaluation import compression, scoring
from tvq_haiku.generation import conversation as conversation_lib
from tvq_haiku.generation import generate as generate_lib
from tvq_haiku.model import preconditions
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import files


class LanguageModel:
  """A trained model of text with its vocabulary.

  >>> from tvq_haiku.model import transformer
  >>> config = TransformerConfig.tiny()
  >>> model = transformer.make_transformer(config)
  >>> params = model.init(jax.random.key(0), jax.numpy.zeros((1, 1), int))
  >>> lm = LanguageModel(params, config)
  >>> texts = lm.generate(["It was ", "She was "], max_new_tokens=8, temperature=0.8)
  >>> len(texts), lm.score(texts).bits_per_byte.shape
  (2, (2,))
  """

  def __init__(
    self, params: Params, config: TransformerConfig, *, vocabulary: Vocabulary | None = None
  ):
    """Checks that the arguments fit each other.

    Args:
      params: parameters of `make_transformer(config)`.
      config: configuration of the model, which must be causal and read tokens.
      vocabulary: vocabulary of the model. None: bytes.

    Raises:
      ValueError: an argument does not fit the others; the message names it.
      TypeError: an argument has a wrong type; the message names it.
    """
    preconditions.check_language_model("LanguageModel", params, config)
    vocabulary = ByteVocabulary if vocabulary is None else vocabulary
    vocabulary_lib.check_vocabulary("LanguageModel", vocabulary, config.n_vocab)
    self.params = params
    self.config = config
    self.vocabulary = vocabulary

  def __repr__(self) -> str:
    return f"LanguageModel(n_vocab={self.config.n_vocab}, vocabulary={self.vocabulary.fingerprint})"

  def generate(
    self,
    prompts: str | bytes | Sequence[str | bytes],
    *,
    max_new_tokens: int,
    rng: Array | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    stop: Sequence[str | bytes] = (),
    show_progress: bool = False,
  ) -> str | list[str]:
    """Continues one text or several texts.

    Args:
      prompts: a text (str or bytes), which may be empty, or a list of texts.
      max_new_tokens: maximum number of tokens to sample for each prompt.
      rng: one key, or one for each prompt, as in `tvq.generate`. None: jax.random.key(0).
      temperature: as in `tvq.generate`.
      top_p: as in `tvq.generate`.
      top_k: as in `tvq.generate`.
      min_p: as in `tvq.generate`.
      stop: stop texts: a text ends before the first of them.
      show_progress: reports progress on standard error.

    Returns:
      The text after the prompt; a list of them if `prompts` is a list.

    Raises:
      ValueError, TypeError: an argument has a wrong value or type; the message names it.
    """
    is_one = isinstance(prompts, (str, bytes, bytearray))
    texts = generate_lib.continue_text(
      self.params,
      self.config,
      [prompts] if is_one else prompts,
      max_new_tokens=max_new_tokens,
      rng=_default_key(rng),
      temperature=temperature,
      top_p=top_p,
      top_k=top_k,
      min_p=min_p,
      stop=stop,
      vocabulary=self.vocabulary,
      show_progress=show_progress,
    )
    return texts[0] if is_one else texts

  def stream(
    self,
    prompt: str | bytes = "",
    *,
    max_new_tokens: int,
    stop: Sequence[str | bytes] = (),
    **settings: Any,
  ) -> Iterator[str]:
    """Continues a text, and yields it in chunks as it is sampled.

    Joined, the chunks are the text that `generate` returns.

    Args:
      prompt: a text, which may be empty.
      max_new_tokens: maximum number of tokens to sample.
      stop: stop texts: the text ends before the first of them.
      **settings: `rng`, `temperature`, `top_p`, `top_k` and `min_p` of `generate`.

    Returns:
      An iterator of non-empty texts.

    Raises:
      ValueError, TypeError: an argument has a wrong value or type; the message names it.
    """
    conversation = self.conversation(**settings)
    chunks = conversation.write(prompt, max_new_tokens=max_new_tokens, stop=stop)

    def chunks_and_rest() -> Iterator[str]:
      yield from chunks
      if conversation.pending:  # a part of a character that `max_new_tokens` has cut
        yield conversation.pending.decode(errors="replace")

    return chunks_and_rest()

  def conversation(
    self, *, rng: Array | None = None, **settings: Any
  ) -> conversation_lib.Conversation:
    """Starts a conversation, which keeps the state of the model between prompts.

    Args:
      rng: one key. None: jax.random.key(0).
      **settings: arguments of `tvq.Conversation`, such as `temperature`, and the fields of a state
        that `tvq.load_state` has read.

    Raises:
      ValueError, TypeError: an argument has a wrong value or type; the message names it.
    """
    return conversation_lib.Conversation(
      self.params, self.config, rng=_default_key(rng), vocabulary=self.vocabulary, **settings
    )

  def score(
    self, texts: Sequence[str | bytes], *, batch_size: int = 8, show_progress: bool = False
  ) -> scoring.Scores:
    """Computes the log-probability of each text.

    Args:
      texts: a list or an array of texts.
      batch_size: maximum number of texts in a batch.
      show_progress: reports progress on standard error.

    Raises:
      ValueError, TypeError: an argument has a wrong value or type; the message names it.
    """
    return scoring.score(
      self.params,
      self.config,
      texts,
      vocabulary=self.vocabulary,
      batch_size=batch_size,
      show_progress=show_progress,
    )

  def compress(self, data: bytes, *, rows: int = 1, show_progress: bool = False) -> bytes:
    """Compresses data losslessly, to about their negative log-likelihood.

    Args:
      data: any bytes.
      rows: number of parts that are compressed in parallel; each starts without context.
      show_progress: reports progress on standard error.

    Returns:
      The compressed data, for `decompress`.

    Raises:
      ValueError, TypeError: an argument has a wrong value or type; the message names it.
    """
    return compression.compress(
      self.params,
      self.config,
      data,
      vocabulary=self.vocabulary,
      rows=rows,
      show_progress=show_progress,
    )

  def decompress(self, packed: bytes, *, show_progress: bool = False) -> bytes:
    """Restores the data that `compress` was given.

    Args:
      packed: result of `compress` with the same model, on the same kind of machine.
      show_progress: reports progress on standard error.

    Raises:
      CompressionError: the data cannot be restored; the message says why.
    """
    return compression.decompress(
      self.params,
      self.config,
      packed,
      vocabulary=self.vocabulary,
      show_progress=show_progress,
    )

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the model to a new directory, completely or not at all, for `load`.

    Args:
      directory: the directory to create; it may exist if it is empty. It holds params.safetensors
        and, if tokens are not bytes, vocab.model.

    Raises:
      FileExistsError: the directory holds files.
      OSError: the directory cannot be written.
      ValueError: the vocabulary is neither a `ByteVocabulary` nor a `PieceVocabulary`.
    """
    contents = {export.PARAMS_FILE: export.serialize_params(self.params, self.config)}
    if isinstance(self.vocabulary, PieceVocabulary):
      contents[run_directory.VOCABULARY_FILE] = self.vocabulary.model
    elif self.vocabulary is not ByteVocabulary:
      raise ValueError(
        f"save: vocabulary={self.vocabulary!r} cannot be saved, only a ByteVocabulary or a "
        "PieceVocabulary: use tvq_haiku.export_params, and pass the vocabulary to `load`."
      )
    files.write_directory(pathlib.Path(directory).absolute(), contents)


def load(
  path: str | os.PathLike, *, vocabulary: Vocabulary | None = None, weights: str = "best"
) -> LanguageModel:
  """Loads a trained model of text with its vocabulary.

  Args:
    path: the directory of a training run, a directory that `LanguageModel.save` wrote, or a
      .safetensors file of `export_params`.
    vocabulary: vocabulary of the model. None: vocab.model in the directory (or next to the file) if
      it exists, otherwise bytes.
    weights: which checkpoint of a run to load. "best": the one with the lowest validation loss, or
      the newest one if no validation was made; "last": the newest one.

  Raises:
    ValueError: there is no model at `path`, it is damaged (a `CheckpointError` for a run), or the
      vocabulary is not that of the model.
    TypeError: `path` is not a path.
    OSError: a file cannot be read.
    ImportError: a package that reads the files is not installed.
  """
  if not isinstance(path, (str, os.PathLike)):
    raise TypeError(f"load: path must be a str or a pathlib.Path, got {path!r}.")
  path = pathlib.Path(path)
  if not path.exists():
    raise ValueError(
      f"load: {path} does not exist. Pass the directory of a training run, a directory that "
      "LanguageModel.save wrote, or a .safetensors file."
    )
  if file := export.exported_file(path):
    params, config = export.import_params(file)
  else:
    run = checkpoints.load_run(path, weights=weights)
    params, config = run.train_state.params, run.config
  if vocabulary is None and (file := vocabulary_file(path)):
    vocabulary = PieceVocabulary(file)
  return LanguageModel(params, config, vocabulary=vocabulary)


def vocabulary_file(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the vocab.model that belongs to a saved model, or None if there is none.

  Args:
    path: the directory of a run or its best/, or the directory or file of exported parameters.
  """
  directory = path.absolute()
  if directory.is_file():
    directory = directory.parent
  directories = [directory]
  if directory.name == run_directory.BEST_DIRECTORY:
    directories.append(directory.parent)  # best/ is a part of the directory of a run
  candidates = [directory / run_directory.VOCABULARY_FILE for directory in directories]
  return next((file for file in candidates if file.is_file()), None)


def _default_key(rng: Array | None) -> Array:
  return jax.random.key(0) if rng is None else rng
