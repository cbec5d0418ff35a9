"""Generation: prompts are read by blocks, then tokens are drawn one by one in one compiled loop.

Letters: B batch, P prompt length, T tokens, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data.vocabulary import ByteVocabulary, Vocabulary
from tvq_haiku.generation import decoder as decoder_lib
from tvq_haiku.generation import sampling as sampling_lib
from tvq_haiku.generation.sampling import SamplingParams
from tvq_haiku.model import transformer
from tvq_haiku.types import Array
from tvq_haiku.utils import checks, progress

_LONGEST_WINDOW = 1024  # tokens of a prompt, read in one call
_LONGEST_LOOP = 256  # tokens drawn in one call, which nothing can interrupt


class GenerateOutput(NamedTuple):
  """What was drawn."""

  tokens: Array  # [B, max_new_tokens] int32; after a row's end: 0
  logprobs: Array  # [B, max_new_tokens] f32: of the model at temperature 1; after a row's end: 0
  lengths: Array  # [B] int32: tokens drawn, with the eos or stop sequence that ended the row
  state: transformer.TransformerState  # after prompts and drawn tokens
  logits: Array  # [B, X] f32: of the token after those


class GenerationState(NamedTuple):
  """Where B texts stand between two tokens."""

  state: decoder_lib.DecodeState
  logits: Array  # [B, X] f32: of the next token
  ended: Array  # [B] bool
  tail: Array  # [B, n] int32: the last tokens drawn, as many as the longest stop sequence has


class SampledTokens(NamedTuple):
  """Some tokens of B texts."""

  tokens: Array  # [B, n] int32; 0 after the end
  logprobs: Array  # [B, n] f32; 0 after the end
  lengths: Array  # [B] int32


def generate(
  params: Mapping[str, Mapping[str, Array]],
  config: TransformerConfig,
  prompts: Array,
  *,
  max_new_tokens: int,
  rng: Array,
  lengths: Sequence[int] | Array | None = None,
  temperature: float = 1.0,
  top_p: float = 1.0,
  top_k: int | None = None,
  min_p: float | None = None,
  eos_id: int | None = None,
  stop: Sequence[Sequence[int]] = (),
  state: transformer.TransformerState | None = None,
  logits: Array | None = None,
  show_progress: bool = False,
) -> GenerateOutput:
  """Continues each prompt.

  A row gives what it gives alone, whatever stands beside it (up to the rounding of products of
  another shape). Memory does not depend on the length of the prompt or of the text.

  Args:
    params: of `make_transformer(config)`.
    config: the model.
    prompts: [B, P] integers; P may be 0.
    max_new_tokens: how many to draw, at most.
    rng: one key, into which each prompt is folded, so that a row's text does not depend on its
      batch (equal prompts of one batch differ); or [B] keys, one for each row. A token is drawn
      with the key of its place in the text.
    lengths: [B] how many tokens of each prompt are real, the padding being behind; None: all.
    temperature: 0 takes the likeliest token.
    top_p: draws from the smallest set of likeliest tokens whose probabilities reach it.
    top_k: draws from that many likeliest tokens.
    min_p: draws from tokens with at least this share of the greatest probability.
    eos_id: ends a row; and begins a text whose prompt is empty.
    stop: sequences of tokens, each of which ends a row when it has been drawn in full.
    state: what the prompts continue; None: nothing.
    logits: [B, X] that came with the state, for rows whose prompt is empty.
    show_progress: on standard error.

  Returns:
    A `GenerateOutput`.

  Raises:
    ValueError, TypeError: an argument does not fit; the message names it.

  >>> config = TransformerConfig.tiny()
  >>> params = transformer.make_transformer(config).init(
  ...     jax.random.key(0), jnp.ones((1, 1), jnp.int32), transformer.initial_state(config, 1))
  >>> out = generate(params, config, np.array([[5, 6, 7]]), max_new_tokens=4, rng=jax.random.key(1))
  >>> out.tokens.shape, out.lengths.tolist(), out.state.position.tolist()
  ((1, 4), [4], [7])
  """
  if not config.causal:
    raise ValueError("generate: causal=False: an encoder does not continue a text.")
  try:
    sampling = sampling_lib.make_sampling_params(
      temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p
    )
  except ValueError as error:
    raise ValueError(f"generate: {error}") from None
  transformer.check_params(params, config)
  rows = _rows(prompts, lengths, config)
  B = len(rows)
  for name, value, valid, rule in (
    (
      "max_new_tokens",
      max_new_tokens,
      max_new_tokens == int(max_new_tokens) >= 1,
      "must be an integer, at least 1",
    ),
    (
      "eos_id",
      eos_id,
      eos_id is None or 0 <= eos_id < config.n_vocab,
      f"must lie in [0, {config.n_vocab}), or be None",
    ),
  ):
    if not valid:
      raise ValueError(f"generate: {name}={value!r} {rule}.")
  stop = tuple(tuple(int(token) for token in sequence) for sequence in stop)
  if not all(stop):
    raise ValueError("generate: stop: a stop sequence must have at least one token.")
  keys = sampling_lib.example_rngs(rng, rows)
  if state is None:
    state = transformer.initial_state(config, B)
  checks.check_state(state, transformer.initial_state, config, B)
  if logits is not None and jnp.shape(logits) != (B, config.n_vocab):
    raise ValueError(
      f"generate: logits must have shape [B={B}, X={config.n_vocab}], got {jnp.shape(logits)}."
    )
  if logits is None:
    is_cold = np.asarray(state.document) < 0
    for b, row in enumerate(rows):
      if row.size == 0 and not is_cold[b]:
        raise ValueError(
          f"generate: prompt {b} is empty: give the logits that came with its state."
        )
      if row.size == 0 and eos_id is None:
        raise ValueError(f"generate: prompt {b} is empty: it needs an eos_id to begin with.")
    rows = [row if row.size else np.array([eos_id], np.int32) for row in rows]
  state, logits = prefill(params, config, rows, state, logits)
  weights = decoder_lib.prepare_weights(config, params)
  now = start_generation(config, state, logits, stop=stop)
  parts, left = [], int(max_new_tokens)
  n = min(_LONGEST_LOOP, _next_power(left))
  with progress.bar("writing", left, enabled=show_progress) as shown:
    while left > 0 and not (parts and np.all(now.ended)):
      part, now = sample_tokens(
        config,
        weights,
        now,
        keys,
        sampling,
        min(left, n),
        n=n,
        eos_id=None if eos_id is None else int(eos_id),
        stop=stop,
      )
      parts.append(part)
      left -= n
      shown(int(max_new_tokens) - max(left, 0))

  def joined(field: str) -> Array:
    whole = jnp.concatenate([getattr(part, field) for part in parts], axis=1)[:, :max_new_tokens]
    return jnp.pad(whole, ((0, 0), (0, max_new_tokens - whole.shape[1])))

  return GenerateOutput(
    joined("tokens"),
    joined("logprobs"),
    sum(part.lengths for part in parts),
    state=decoder_lib.finish_decoding(now.state),
    logits=now.logits,
  )


def _next_power(n: int) -> int:
  """The power of two at or above n: all lengths up to it share one compiled program."""
  return 1 << max(n - 1, 0).bit_length()


def _rows(prompts: Array, lengths: Any, config: TransformerConfig) -> list[np.ndarray]:
  """The prompts without their padding."""
  prompts = np.asarray(prompts)
  if prompts.ndim != 2 or prompts.shape[0] == 0:
    raise ValueError(f"generate: prompts must be [B, P] with B >= 1, got shape {prompts.shape}.")
  B, P = prompts.shape
  lengths = np.full(B, P) if lengths is None else np.asarray(lengths)
  if not np.issubdtype(lengths.dtype, np.integer):
    raise TypeError(f"generate: lengths must be integers, got {lengths.dtype}.")
  if lengths.shape != (B,) or not ((0 <= lengths) & (lengths <= P)).all():
    raise ValueError(
      f"generate: lengths={lengths.tolist()} must be one of 0...{P} for each of {B} prompts."
    )
  if P:
    checks.check_tokens(prompts, config.n_vocab)
  return [row[:n].astype(np.int32) for row, n in zip(prompts, lengths)]


def prefill(
  params: Any,
  config: TransformerConfig,
  rows: Sequence[np.ndarray],
  state: transformer.TransformerState,
  logits: Array | None = None,
) -> tuple[transformer.TransformerState, Array]:
  """Reads texts of any lengths, window by window.

  Args:
    params: of the model.
    config: the model.
    rows: B arrays of tokens; an empty one leaves its row as it is.
    state: what they continue.
    logits: [B, X] for rows that are empty; None: zeros.

  Returns:
    The state after them, and the logits [B, X] of the token after each.
  """
  if logits is None:
    logits = jnp.zeros((len(rows), config.n_vocab), jnp.float32)
  lengths = np.array([len(row) for row in rows])
  longest = int(lengths.max())
  T = min(_LONGEST_WINDOW, _next_power(longest))
  for start in range(0, longest, T):
    tokens = np.zeros((len(rows), T), np.int32)
    for b, row in enumerate(rows):
      part = row[start : start + T]
      tokens[b, : len(part)] = part
    state, logits = _read_window(
      config, params, tokens, np.clip(lengths - start, 0, T), state, logits
    )
  return state, logits


@functools.partial(jax.jit, static_argnums=0)
def _read_window(
  config: TransformerConfig,
  params: Any,
  tokens: Array,
  lengths: Array,
  state: transformer.TransformerState,
  logits: Array,
):
  document = jnp.maximum(state.document, 0)[:, None]
  is_token = jnp.arange(tokens.shape[1]) < lengths[:, None]
  out = transformer.make_transformer(config).apply(
    params, None, tokens, state, doc_ids=jnp.where(is_token, document, -1)
  )
  last = jnp.maximum(lengths - 1, 0)[:, None, None]
  now = jnp.take_along_axis(out.logits, last, axis=1)[:, 0]
  return out.state, jnp.where((lengths > 0)[:, None], now, logits)


@functools.partial(jax.jit, static_argnums=0, static_argnames="stop")
def start_generation(
  config: TransformerConfig,
  state: transformer.TransformerState,
  logits: Array,
  *,
  stop: tuple[tuple[int, ...], ...] = (),
) -> GenerationState:
  """What `sample_tokens` goes on from, after `prefill`."""
  B = logits.shape[0]
  n = max([1, *map(len, stop)])
  return GenerationState(
    decoder_lib.start_decoding(config, state),
    logits,
    jnp.zeros((B,), bool),
    jnp.full((B, n), -1, jnp.int32),
  )


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("n", "eos_id", "stop"), donate_argnames="now"
)
def sample_tokens(
  config: TransformerConfig,
  weights: decoder_lib.DecoderWeights,
  now: GenerationState,
  keys: Array,
  sampling: SamplingParams,
  limit: int | Array,
  *,
  n: int,
  eos_id: int | None,
  stop: tuple[tuple[int, ...], ...] = (),
) -> tuple[SampledTokens, GenerationState]:
  """Draws up to `limit` <= n tokens for each row, until all have ended.

  Args:
    config: the model.
    weights: of `decoding.prepare`.
    now: where the rows stand; its memory is given away.
    keys: [B] typed keys.
    sampling: how to draw.
    limit: how many, at most.
    n: the length of the result.
    eos_id: ends a row.
    stop: sequences that end a row.
  """
  B = now.logits.shape[0]
  draw = jax.vmap(
    lambda key, place, row: sampling_lib.sample_token(jax.random.fold_in(key, place), row, sampling)
  )

  def goes_on(carry: tuple[Array, GenerationState, Array, Array]) -> Array:
    i, now, _, _ = carry
    return (i < limit) & ~jnp.all(now.ended)

  def one(carry: tuple[Array, GenerationState, Array, Array]):
    i, now, tokens, logprobs = carry
    active = ~now.ended
    token = jnp.where(active, draw(keys, now.state.read, now.logits), 0)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(now.logits), token[:, None], axis=1)[:, 0]
    logits, state = decoder_lib.decode_token(config, weights, token, now.state, active)
    tail = jnp.concatenate([now.tail[:, 1:], token[:, None]], axis=1)
    ended = now.ended
    if eos_id is not None:
      ended |= token == eos_id
    for sequence in stop:
      ended |= jnp.all(tail[:, -len(sequence) :] == jnp.array(sequence), axis=1)
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=1)
    now = GenerationState(state, jnp.where(active[:, None], logits, now.logits), ended, tail)
    return i + 1, now, put(tokens, token), put(logprobs, jnp.where(active, logprob, 0.0))

  written = now.state.written
  start = (jnp.zeros((), jnp.int32), now, jnp.zeros((B, n), jnp.int32), jnp.zeros((B, n)))
  _, now, tokens, logprobs = jax.lax.while_loop(goes_on, one, start)
  return SampledTokens(tokens, logprobs, now.state.written - written), now


def continue_text(
  params: Any,
  config: TransformerConfig,
  prompts: Sequence[str | bytes],
  *,
  max_new_tokens: int,
  rng: Array,
  stop: Sequence[str | bytes] = (),
  vocabulary: Vocabulary = ByteVocabulary,
  **settings: Any,
) -> list[str]:
  """The text that a model writes after each prompt, without the prompt.

  Args:
    params: of the model.
    config: the model.
    prompts: texts; may be empty.
    max_new_tokens: bytes (or what else tokens stand for) to write, at most.
    rng: as in `generate`.
    stop: texts, at each of which writing ends; they are not part of the result. With a vocabulary
      of pieces, a text ends where it is written in just the pieces that it is encoded by.
    vocabulary: of the model.
    **settings: `temperature`, `top_p`, `top_k`, `min_p`, `show_progress` of `generate`.
  """
  vocabulary.check("continue_text", config.n_vocab)
  for name, texts in (("prompts", prompts), ("stop", stop)):
    if isinstance(texts, (str, bytes)) or (name == "prompts" and not texts):
      raise ValueError(f"continue_text: {name}={texts!r} must be a list of at least one text.")
  eos = ByteVocabulary.EOS  # of every vocabulary
  rows = [np.append(eos, vocabulary.encode(text)) for text in prompts]
  lengths = np.array([len(row) for row in rows])
  tokens = np.zeros((len(rows), lengths.max()), np.int32)
  for row, target in zip(rows, tokens):
    target[: len(row)] = row
  endings = [vocabulary.encode(text).tolist() for text in stop]
  out = generate(
    params,
    config,
    tokens,
    lengths=lengths,
    max_new_tokens=max_new_tokens,
    rng=rng,
    eos_id=eos,
    stop=endings,
    **settings,
  )
  texts = []
  for row, n in zip(np.asarray(out.tokens), np.asarray(out.lengths)):
    written = row[:n].tolist()
    matched = max((len(s) for s in endings if written[-len(s) :] == s), default=0)
    texts.append(vocabulary.decode(written[: n - matched]).decode(errors="replace"))
  return texts
