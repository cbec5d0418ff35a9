"""Log-probabilities of texts, each scored independently.

Letters: B batch, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data import vocabulary as vocabulary_lib
from tvq_haiku.data.vocabulary import ByteVocabulary, Vocabulary
from tvq_haiku.model import preconditions, transformer
from tvq_haiku.ops.padding import round_up_to_power_of_two
from tvq_haiku.training import losses
from tvq_haiku.types import Array, Batch, HostBatch, Params
from tvq_haiku.utils import progress, value_checks

_MIN_WINDOW_LEN = 16  # shorter texts share a compiled program with those of this length


class Scores(NamedTuple):
  """Log-probabilities and lengths of n texts."""

  logprobs: np.ndarray  # [n] f64: in nats; including the eos that ends the text
  n_token: np.ndarray  # [n] int64: including the eos
  n_byte: np.ndarray  # [n] int64

  @property
  def bits_per_byte(self) -> np.ndarray:
    """Bits per byte [n] f64; infinite for an empty text, because its eos has a cost, too."""
    with np.errstate(divide="ignore"):
      return -self.logprobs / math.log(2) / self.n_byte


def score(
  params: Params,
  config: TransformerConfig,
  texts: Sequence[str | bytes],
  *,
  vocabulary: Vocabulary = ByteVocabulary,
  batch_size: int = 8,
  window_len: int = 512,
  show_progress: bool = False,
) -> Scores:
  """Computes the log-probability of each text under a model of text, in constant memory.

  Every text starts from the initial state and ends with an eos, like a document in training. Every
  token has all earlier tokens of its text as context. Texts of different lengths may share a batch.

  Args:
    params: parameters of the model.
    config: configuration of the model.
    texts: a list or an array of str, which are encoded as UTF-8, or bytes.
    vocabulary: vocabulary of the model. With subwords, a score is that of the tokens of
      `vocabulary.encode`.
    batch_size: B, the maximum number of texts in a batch.
    window_len: T, the number of tokens of each text in a step; the result does not depend on it.
    show_progress: whether to show progress on standard error.

  Returns:
    The scores, in the order of `texts`.

  Raises:
    ValueError: the model is an encoder or has another vocabulary, `params` do not fit it, `texts`
      is a single text, or a size is less than 1.
    TypeError: an argument has a wrong type; the message names it, and the index of a text.

  >>> config = TransformerConfig.tiny()
  >>> model = transformer.make_transformer(config)
  >>> params = model.init(jax.random.key(0), jnp.ones((1, 1), jnp.int32))
  >>> scores = score(params, config, ["Anne", "Captain Wentworth"])
  >>> scores.n_token.tolist(), scores.bits_per_byte.shape
  ([5, 18], (2,))
  """
  preconditions.check_language_model("score", params, config)
  vocabulary_lib.check_vocabulary("score", vocabulary, config.n_vocab)
  batch_size = value_checks.check_integer("score", "batch_size", batch_size)
  window_len = value_checks.check_integer("score", "window_len", window_len)
  raw_texts = value_checks.check_texts("score", "texts", texts)
  eos = [vocabulary.EOS]
  encoded = [
    vocabulary_lib.encode_text("score", f"texts[{i}]", vocabulary, raw)
    for i, raw in enumerate(raw_texts)
  ]
  documents = [np.concatenate([eos, tokens, eos]) for tokens in encoded]
  n_token = np.array([len(document) - 1 for document in documents], np.int64)
  logprobs = np.zeros(len(documents), np.float64)
  # Texts of similar length share a batch, so that little of it is padding.
  order = np.argsort(-n_token, kind="stable")
  groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
  n_window = sum(-(-int(n_token[group[0]]) // window_len) for group in groups)
  n_done = 0
  with progress.bar("scoring", n_window, enabled=show_progress) as report:
    for group in groups:
      B = min(batch_size, round_up_to_power_of_two(len(group)))
      state = transformer.initial_state(config, B)
      for batch in _windows([documents[i] for i in group], B, window_len):
        nats, state = _window_nats(params, config, batch, state)
        logprobs[group] -= np.asarray(nats, np.float64)[: len(group)]
        n_done += 1
        report(n_done)
  return Scores(logprobs, n_token, np.array([len(raw) for raw in raw_texts], np.int64))


def _windows(
  documents: Sequence[np.ndarray], batch_size: int, window_len: int
) -> Iterator[HostBatch]:
  """Yields the windows of several documents, one per batch element; the rest is padding.

  If all documents fit into one window, its length is that of the longest document, rounded up to a
  power of two (at least 16), so that documents of many lengths share a few compiled programs.

  Args:
    documents: at most `batch_size` arrays of tokens; the first and the last token of each is an
      eos.
    batch_size: B.
    window_len: maximum number of tokens of a document in a window.

  Yields:
    Batches [B, T].
  """
  longest = max(len(tokens) for tokens in documents) - 1
  T = min(window_len, max(_MIN_WINDOW_LEN, round_up_to_power_of_two(longest)))
  for start in range(0, longest, T):
    inputs, targets = np.zeros((2, batch_size, T), np.int32)
    doc_ids = np.full((batch_size, T), -1, np.int32)
    for b, tokens in enumerate(documents):
      window = tokens[start : start + T + 1]
      n = max(len(window) - 1, 0)
      inputs[b, :n], targets[b, :n], doc_ids[b, :n] = window[:n], window[1:], 0
    yield {"inputs": inputs, "targets": targets, "doc_ids": doc_ids}


@functools.partial(jax.jit, static_argnames="config")
def _window_nats(
  params: Params, config: TransformerConfig, batch: Batch, state: transformer.TransformerState
) -> tuple[Array, transformer.TransformerState]:
  """Returns the negative log-likelihood [B] f32 of a window, and the state after it."""
  inputs, targets, doc_ids = (batch[key] for key in ("inputs", "targets", "doc_ids"))
  chex.assert_equal_shape([inputs, targets, doc_ids])
  out = transformer.make_transformer(config).apply(params, None, inputs, state, doc_ids=doc_ids)
  nll = losses.token_nll(out.logits, targets)
  return jnp.sum(jnp.where(doc_ids >= 0, nll, 0.0), axis=1), out.state
