"""The likelihood of texts, each on its own.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.model import transformer
from tvq_haiku.training import losses
from tvq_haiku.types import Array
from tvq_haiku.utils import progress


class Scores(NamedTuple):
  """What n texts cost under a model."""

  logprobs: np.ndarray  # [n] f64: nats, the closing eos included
  n_token: np.ndarray  # [n] int64, the eos included
  n_byte: np.ndarray  # [n] int64

  @property
  def bits_per_byte(self) -> np.ndarray:
    """[n]; infinite for an empty text, whose eos costs something, too."""
    with np.errstate(divide="ignore"):
      return -self.logprobs / math.log(2) / self.n_byte


def score(
  params: Any,
  config: TransformerConfig,
  texts: Sequence[str | bytes],
  *,
  batch_size: int = 8,
  window_len: int = 512,
  show_progress: bool = False,
) -> Scores:
  """Log-probability of each text under a byte-level model, in one pass of constant memory.

  Every text starts from nothing and is closed by an eos, like a document in training; all of it is
  context for its later bytes. Texts of any lengths are read side by side.

  Args:
    params: of a model with the byte vocabulary.
    config: the model.
    texts: str or bytes.
    batch_size: texts read side by side.
    window_len: T; changes nothing but speed.
    show_progress: on standard error.

  >>> config = TransformerConfig.tiny()
  >>> params = transformer.make_transformer(config).init(
  ...     jax.random.key(0), jnp.ones((1, 1), jnp.int32), transformer.initial_state(config, 1))
  >>> scores = score(params, config, ["Anne", "Captain Wentworth"])
  >>> scores.n_token.tolist(), scores.bits_per_byte.shape
  ([5, 18], (2,))
  """
  if not config.causal:
    raise ValueError("score: causal=False: an encoder sees the tokens that it would predict.")
  ByteVocabulary.check("score", config.n_vocab)
  if isinstance(texts, (str, bytes)):
    raise ValueError("score: texts must be a list of texts, not one text.")
  for name, value in (("batch_size", batch_size), ("window_len", window_len)):
    if value < 1:
      raise ValueError(f"score: {name}={value!r} must be at least 1.")
  transformer.check_params(params, config)
  documents = [ByteVocabulary.encode(text) for text in texts]
  n_byte = np.array([len(document) for document in documents], np.int64)
  logprobs = np.zeros(len(documents), np.float64)
  order = np.argsort(-n_byte, kind="stable")  # texts of like length side by side
  groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
  total = sum(-(-(int(n_byte[group[0]]) + 1) // window_len) for group in groups)
  done = 0
  with progress.bar("scoring", total, enabled=show_progress) as shown:
    for group in groups:
      B, longest = len(group), int(n_byte[group[0]]) + 1
      T = min(window_len, longest)
      state = transformer.initial_state(config, B)
      for start in range(0, longest, T):
        tokens, targets = np.zeros((2, B, T), np.int32)
        doc_ids = np.full((B, T), -1, np.int32)
        for b, i in enumerate(group):
          closed = np.append(documents[i][max(start - 1, 0) : start + T], ByteVocabulary.EOS)
          if start == 0:
            closed = np.append(ByteVocabulary.EOS, closed)
          n = min(T, len(closed) - 1)
          tokens[b, :n], targets[b, :n], doc_ids[b, :n] = closed[:n], closed[1 : n + 1], 0
        sums, state = _window(config, params, tokens, targets, doc_ids, state)
        logprobs[group] -= np.asarray(sums, np.float64)
        done += 1
        shown(done)
  return Scores(logprobs, n_byte + 1, n_byte)


@functools.partial(jax.jit, static_argnums=0)
def _window(
  config: TransformerConfig,
  params: Any,
  tokens: Array,
  targets: Array,
  doc_ids: Array,
  state: transformer.TransformerState,
) -> tuple[Array, transformer.TransformerState]:
  """Nats [B] of one window, and the state after it."""
  out = transformer.make_transformer(config).apply(params, None, tokens, state, doc_ids=doc_ids)
  nll = losses.token_nll(out.logits, targets)
  return jnp.sum(jnp.where(doc_ids >= 0, nll, 0.0), axis=1), out.state
