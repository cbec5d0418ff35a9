"""Sampling: a prompt is read by blocks, then tokens are drawn one by one in one compiled loop."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku import inputs
from tvq_haiku import transformer
from tvq_haiku.config import TransformerConfig
from tvq_haiku.data.vocabulary import ByteVocabulary

Array = jax.Array


class GenerateOutput(NamedTuple):
  """What was drawn."""

  tokens: Array  # [B, max_new_tokens] int32; after a row's eos: 0
  logprobs: Array  # [B, max_new_tokens] f32: of the model at temperature 1; after a row's eos: 0
  lengths: Array  # [B] int32: tokens drawn, the eos included
  state: transformer.TransformerState  # after prompts and drawn tokens


def generate(
    params: Any,
    config: TransformerConfig,
    prompts: Array,
    *,
    max_new_tokens: int,
    rng: Array,
    lengths: Array | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    eos_id: int | None = None,
    state: transformer.TransformerState | None = None,
) -> GenerateOutput:
  """Continues each prompt.

  Args:
    params: of `make_transformer(config)`.
    config: the model.
    prompts: [B, P] integers, P >= 1. A text that starts from nothing starts with the eos.
    max_new_tokens: how many to draw.
    rng: row b draws from `fold_in(rng, b)`.
    lengths: [B] how many tokens of each prompt are real, the padding being behind; None: all.
    temperature: 0 takes the likeliest token.
    top_p: draws from the smallest set of likeliest tokens whose probabilities reach it.
    top_k: draws from that many likeliest tokens.
    min_p: draws from tokens with at least this share of the greatest probability.
    eos_id: ends a row.
    state: what the prompts continue; None: nothing.

  Returns:
    A `GenerateOutput`.
  """
  if not config.causal:
    raise ValueError("generate: causal=False: an encoder does not continue a text.")
  prompts = jnp.asarray(prompts)
  inputs.check_tokens(prompts, config.n_vocab)
  lengths = np.full(prompts.shape[:1], prompts.shape[1]) if lengths is None else np.asarray(lengths)
  if not np.issubdtype(lengths.dtype, np.integer):
    raise TypeError(f"generate: lengths must be integers, got {lengths.dtype}.")
  if lengths.shape != prompts.shape[:1] or not ((1 <= lengths) & (lengths <= prompts.shape[1])).all():
    raise ValueError(f"generate: lengths={lengths.tolist()} must be one of 1...{prompts.shape[1]} "
                     f"for each of {prompts.shape[0]} prompts.")
  for name, value, valid, rule in (
      ("max_new_tokens", max_new_tokens, max_new_tokens == int(max_new_tokens) >= 1,
       "must be an integer, at least 1"),
      ("temperature", temperature, temperature >= 0, "must not be negative"),
      ("top_p", top_p, 0 < top_p <= 1, "must lie in (0, 1]"),
      ("top_k", top_k, top_k is None or top_k == int(top_k) >= 1,
       "must be an integer, at least 1, or None"),
      ("eos_id", eos_id, eos_id is None or 0 <= eos_id < config.n_vocab,
       f"must lie in [0, {config.n_vocab}), or be None"),
      ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "must lie in [0, 1], or None")):
    if not valid:
      raise ValueError(f"generate: {name}={value!r} {rule}.")
  if state is None:
    state = transformer.initial_state(config, prompts.shape[0])
  inputs.check_state(state, transformer.initial_state, config, prompts.shape[0])
  settings = (float(temperature), float(top_p), top_k if top_k is None else int(top_k), min_p)
  return _generate(params, rng, prompts.astype(jnp.int32), jnp.asarray(lengths, jnp.int32), state,
                   config=config, max_new_tokens=int(max_new_tokens), settings=settings,
                   eos_id=None if eos_id is None else int(eos_id))


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "settings", "eos_id"))
def _generate(params, rng, prompts, lengths, state, *, config, max_new_tokens, settings, eos_id):
  model = transformer.make_transformer(config)
  B, P = prompts.shape
  keys = jax.vmap(lambda row: jax.random.fold_in(rng, row))(jnp.arange(B))
  document = jnp.maximum(state.document, 0)[:, None]
  is_token = jnp.arange(P) < lengths[:, None]
  out = model.apply(params, None, prompts, state, doc_ids=jnp.where(is_token, document, -1))
  logits = jnp.take_along_axis(out.logits, lengths[:, None, None] - 1, axis=1)[:, 0]

  def step(carry, i):
    state, logits, ended = carry
    drawn = jax.vmap(lambda key, row: sample_token(jax.random.fold_in(key, i), row, *settings))(
        keys, logits)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=1)[:, 0]
    token = jnp.where(ended, 0, drawn)
    out = model.apply(params, None, token[:, None], state,
                      doc_ids=jnp.where(ended[:, None], -1, document))
    now_ended = ended if eos_id is None else ended | (token == eos_id)
    return (out.state, out.logits[:, 0], now_ended), (
        token, jnp.where(ended, 0.0, logprob), ~ended)

  carry = (out.state, logits, jnp.zeros((B,), bool))
  (state, _, _), (tokens, logprobs, drawn) = jax.lax.scan(step, carry, jnp.arange(max_new_tokens))
  return GenerateOutput(tokens.T, logprobs.T, jnp.sum(drawn, axis=0, dtype=jnp.int32), state)


def sample_token(rng: Array, logits: Array, temperature: float = 1.0, top_p: float = 1.0,
                 top_k: int | None = None, min_p: float | None = None) -> Array:
  """Draws one token from logits [X]; the arguments are those of `generate`.

  >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
  >>> int(sample_token(jax.random.key(0), logits, top_p=0.5))
  1
  """
  if temperature == 0.0:
    return jnp.argmax(logits).astype(jnp.int32)
  ordered, tokens = jax.lax.top_k(logits / temperature, logits.shape[-1])
  probabilities = jax.nn.softmax(ordered)
  # The mass of all likelier tokens: below p until the set reaches it, and 0 for the likeliest.
  keep = jnp.cumsum(probabilities) - probabilities < top_p
  if top_k is not None:
    keep &= jnp.arange(keep.size) < top_k
  if min_p is not None:
    keep &= probabilities >= min_p * probabilities[0]
  choice = jax.random.categorical(rng, jnp.where(keep, ordered, -jnp.inf))
  return tokens[choice].astype(jnp.int32)


def continue_text(params: Any, config: TransformerConfig, prompts: Sequence[str], *,
                  max_new_tokens: int, rng: Array, **settings: Any) -> list[str]:
  """The text that a byte-level model writes after each prompt, without the prompt.

  Args:
    params: of a model with the byte vocabulary.
    config: the model.
    prompts: texts; may be empty.
    max_new_tokens: bytes to write, at most.
    rng: as in `generate`.
    **settings: `temperature`, `top_p`, `top_k`, `min_p` of `generate`.
  """
  if config.n_vocab != ByteVocabulary.SIZE:
    raise ValueError(f"continue_text: the model has n_vocab={config.n_vocab}, not the "
                     f"{ByteVocabulary.SIZE} of the byte vocabulary.")
  if isinstance(prompts, str) or not prompts:
    raise ValueError(f"continue_text: prompts={prompts!r} must be a list of at least one text.")
  rows = [np.append(ByteVocabulary.EOS, ByteVocabulary.encode(text)) for text in prompts]
  lengths = np.array([len(row) for row in rows])
  tokens = np.zeros((len(rows), lengths.max()), np.int32)
  for row, target in zip(rows, tokens):
    target[: len(row)] = row
  out = generate(params, config, tokens, lengths=lengths, max_new_tokens=max_new_tokens, rng=rng,
                 eos_id=ByteVocabulary.EOS, **settings)
  return [ByteVocabulary.decode(row).decode(errors="replace") for row in np.asarray(out.tokens)]
