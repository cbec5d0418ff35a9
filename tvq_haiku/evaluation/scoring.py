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
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.model import transformer
from tvq_haiku.training import losses
from tvq_haiku.types import Array, Batch, HostBatch, Params
from tvq_haiku.utils import progress


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
  batch_size: int = 8,
  window_len: int = 512,
  show_progress: bool = False,
) -> Scores:
  """Computes the log-probability of each text under a byte-level model, in constant memory.

  Every text starts from the initial state and ends with an eos, like a document in training. Every
  byte has all earlier bytes of its text as context. Texts of different lengths may share a batch.

  Args:
    params: parameters of a model with the byte vocabulary.
    config: configuration of the model.
    texts: a sequence of str, which are encoded as UTF-8, or bytes.
    batch_size: B, the maximum number of texts in a batch.
    window_len: T, the number of tokens of each text in a step; the result does not depend on it.
    show_progress: whether to show progress on standard error.

  Returns:
    The scores, in the order of `texts`.

  Raises:
    ValueError: the model is an encoder or has another vocabulary, `params` do not fit it, `texts`
      is a single text, or a size is less than 1.

  >>> config = TransformerConfig.tiny()
  >>> model = transformer.make_transformer(config)
  >>> params = model.init(jax.random.key(0), jnp.ones((1, 1), jnp.int32))
  >>> scores = score(params, config, ["Anne", "Captain Wentworth"])
  >>> scores.n_token.tolist(), scores.bits_per_byte.shape
  ([5, 18], (2,))
  """
  if not config.causal:
    raise ValueError(
      "score: causal=False: an encoder sees the tokens that it would predict. Use a causal model."
    )
  ByteVocabulary.check("score", config.n_vocab)
  if isinstance(texts, (str, bytes)):
    raise ValueError(
      f"score: texts must be a list of texts, got one {type(texts).__name__}. Pass [text]."
    )
  for name, value in (("batch_size", batch_size), ("window_len", window_len)):
    if value < 1:
      raise ValueError(f"score: {name}={value!r} must be at least 1.")
  transformer.check_params(params, config)
  documents = [ByteVocabulary.encode(text) for text in texts]
  n_byte = np.array([len(document) for document in documents], np.int64)
  logprobs = np.zeros(len(documents), np.float64)
  # Texts of similar length share a batch, so that little of it is padding.
  order = np.argsort(-n_byte, kind="stable")
  groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
  n_window = sum(-(-(int(n_byte[group[0]]) + 1) // window_len) for group in groups)
  n_done = 0
  with progress.bar("scoring", n_window, enabled=show_progress) as report:
    for group in groups:
      state = transformer.initial_state(config, len(group))
      for batch in _windows([documents[i] for i in group], window_len):
        nats, state = _window_nats(params, config, batch, state)
        logprobs[group] -= np.asarray(nats, np.float64)
        n_done += 1
        report(n_done)
  return Scores(logprobs, n_byte + 1, n_byte)


def _windows(documents: Sequence[np.ndarray], window_len: int) -> Iterator[HostBatch]:
  """Yields the windows [B, T] of B documents, one per batch element; the rest is padding.

  If all documents fit into one window, it is only as long as the longest document.
  """
  eos = ByteVocabulary.EOS
  closed = [np.concatenate([[eos], document, [eos]]) for document in documents]
  longest = max(len(tokens) for tokens in closed) - 1
  T = min(window_len, longest)
  for start in range(0, longest, T):
    inputs, targets = np.zeros((2, len(closed), T), np.int32)
    doc_ids = np.full((len(closed), T), -1, np.int32)
    for b, tokens in enumerate(closed):
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
