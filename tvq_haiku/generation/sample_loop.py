"""The compiled loop that samples tokens until every batch element has ended.

Letters: B batch, T tokens of one call, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.generation import decoder, sampling
from tvq_haiku.generation.decoder_weights import DecoderWeights
from tvq_haiku.generation.sampling import SamplingParams
from tvq_haiku.generation.stopping import StopConditions, ends_text
from tvq_haiku.model import transformer
from tvq_haiku.ops import padding
from tvq_haiku.types import Array
from tvq_haiku.utils import progress

_MAX_CHUNK_LEN = 256  # maximum number of tokens per call, which Ctrl-C cannot interrupt


class GenerationState(NamedTuple):
  """State of B texts between two sampled tokens."""

  decode_state: decoder.DecodeState  # state of the model after the last token
  logits: Array  # [B, X] f32: logits of the next token
  ended: Array  # [B] bool: whether a stop condition is met
  # [B, n] int32: the last n sampled tokens, where n = stop.max_len; -1 where fewer than n have been
  # sampled. Tokens of the prompt are not included, so that no stop sequence begins in the prompt.
  recent_tokens: Array


class SampledTokens(NamedTuple):
  """Result of `sample_tokens`."""

  tokens: Array  # [B, T] int32; 0 after the end of a text
  logprobs: Array  # [B, T] f32: log-probabilities at temperature 1; 0 after the end of a text
  lengths: Array  # [B] int32: number of sampled tokens


@functools.partial(jax.jit, static_argnames="config")
def start_generation(
  config: TransformerConfig,
  state: transformer.TransformerState,
  logits: Array,
  stop: StopConditions,
) -> GenerationState:
  """Returns the initial state of `sample_tokens`.

  Args:
    config: configuration of the model.
    state: the model's state after the prompts, from `prefill`.
    logits: [B, X] f32 of the token after each prompt, from `prefill`.
    stop: the same as for `sample_tokens`.

  Returns:
    A state in which no text has ended.
  """
  B, X = logits.shape
  chex.assert_shape(state.document, (B,))
  chex.assert_equal(X, config.n_vocab)
  return GenerationState(
    decode_state=decoder.start_decoding(config, state),
    logits=logits,
    ended=jnp.zeros((B,), bool),
    recent_tokens=jnp.full((B, stop.max_len), -1, jnp.int32),
  )


def sample_in_chunks(
  weights: DecoderWeights,
  config: TransformerConfig,
  state: GenerationState,
  rngs: Array,
  sampling_params: SamplingParams,
  *,
  max_new_tokens: int,
  stop: StopConditions,
  show_progress: bool,
) -> tuple[SampledTokens, GenerationState]:
  """Calls `sample_tokens` until all texts have ended, and concatenates the results.

  Args:
    weights: from `prepare_weights`.
    config: configuration of the model.
    state: from `start_generation`. Its buffers are donated.
    rngs: [B] typed keys.
    sampling_params: from `make_sampling_params`.
    max_new_tokens: maximum number of tokens to sample for each text, at least 1.
    stop: conditions that end a text.
    show_progress: reports progress on standard error.

  Returns:
    The sampled tokens, T = max_new_tokens, and the state after them.
  """
  chunk_len = min(_MAX_CHUNK_LEN, padding.round_up_to_power_of_two(max_new_tokens))
  chunks: list[SampledTokens] = []
  with progress.bar("sampling", max_new_tokens, enabled=show_progress) as report:
    for start in range(0, max_new_tokens, chunk_len):
      if chunks and np.all(state.ended):
        break
      limit = min(max_new_tokens - start, chunk_len)
      chunk, state = sample_tokens(
        weights, config, state, rngs, sampling_params, limit, chunk_len=chunk_len, stop=stop
      )
      chunks.append(chunk)
      report(start + limit)

  def concatenate(columns: Sequence[Array]) -> Array:
    joined = jnp.concatenate(columns, axis=1)[:, :max_new_tokens]
    return jnp.pad(joined, ((0, 0), (0, max_new_tokens - joined.shape[1])))

  return SampledTokens(
    tokens=concatenate([chunk.tokens for chunk in chunks]),
    logprobs=concatenate([chunk.logprobs for chunk in chunks]),
    lengths=sum(chunk.lengths for chunk in chunks),
  ), state


class _LoopCarry(NamedTuple):
  """The carry of the sampling loop."""

  n_sampled: Array  # [] int32: number of iterations so far
  state: GenerationState
  tokens: Array  # [B, T] int32; 0 in columns that are not yet sampled
  logprobs: Array  # [B, T] f32; 0 in columns that are not yet sampled


@functools.partial(jax.jit, static_argnames=("config", "chunk_len"), donate_argnames="state")
def sample_tokens(
  weights: DecoderWeights,
  config: TransformerConfig,
  state: GenerationState,
  rngs: Array,
  sampling_params: SamplingParams,
  limit: int | Array,
  *,
  chunk_len: int,
  stop: StopConditions,
) -> tuple[SampledTokens, GenerationState]:
  """Samples tokens for each text until all texts have ended or `limit` is reached.

  Args:
    weights: from `prepare_weights`.
    config: configuration of the model.
    state: from `start_generation` or the previous call. Its buffers are donated.
    rngs: [B] typed keys. The number of tokens before a token is folded into its key.
    sampling_params: from `make_sampling_params`.
    limit: [] int32: maximum number of tokens per text, at most `chunk_len`.
    chunk_len: T, the length of the result. A new value recompiles; a new `limit` does not.
    stop: conditions that end a text.

  Returns:
    The sampled tokens, including the eos or stop sequence, and the state after them.
  """
  B = state.logits.shape[0]
  chex.assert_shape((rngs, limit), [(B,), ()])

  def should_continue(carry: _LoopCarry) -> Array:
    return (carry.n_sampled < limit) & ~jnp.all(carry.state.ended)

  def sample_column(carry: _LoopCarry) -> _LoopCarry:
    token, logprob, next_state = _sample_step(
      weights, config, carry.state, rngs, sampling_params, stop
    )
    write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=carry.n_sampled, axis=1)
    return _LoopCarry(
      carry.n_sampled + 1, next_state, write(carry.tokens, token), write(carry.logprobs, logprob)
    )

  start = _LoopCarry(
    n_sampled=jnp.zeros((), jnp.int32),
    state=state,
    tokens=jnp.zeros((B, chunk_len), jnp.int32),
    logprobs=jnp.zeros((B, chunk_len), jnp.float32),
  )
  end = jax.lax.while_loop(should_continue, sample_column, start)
  lengths = end.state.decode_state.n_written - state.decode_state.n_written
  return SampledTokens(end.tokens, end.logprobs, lengths), end.state


def _sample_step(
  weights: DecoderWeights,
  config: TransformerConfig,
  state: GenerationState,
  rngs: Array,
  sampling_params: SamplingParams,
  stop: StopConditions,
) -> tuple[Array, Array, GenerationState]:
  """Samples one token for each text that has not ended, and passes it to the model.

  Returns:
    The token [B] int32, its log-probability [B] f32 (both 0 for texts that have ended), and the
    next state.
  """
  active = ~state.ended
  n_read = state.decode_state.n_read
  token = jnp.where(active, _sample_each(rngs, n_read, state.logits, sampling_params), 0)
  logprobs = jax.nn.log_softmax(state.logits)
  logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
  logits, decode_state = decoder.decode_token(weights, config, token, state.decode_state, active)
  recent_tokens = jnp.concatenate([state.recent_tokens[:, 1:], token[:, None]], axis=1)
  next_state = GenerationState(
    decode_state=decode_state,
    logits=jnp.where(active[:, None], logits, state.logits),
    ended=state.ended | ends_text(recent_tokens, stop),
    recent_tokens=recent_tokens,
  )
  return token, jnp.where(active, logprob, 0.0), next_state


def _sample_each(
  rngs: Array, n_read: Array, logits: Array, sampling_params: SamplingParams
) -> Array:
  """Samples tokens [B] from logits [B, X]; `n_read` [B] is folded into the keys [B]."""

  def sample(rng: Array, n: Array, example_logits: Array) -> Array:
    return sampling.sample_token(jax.random.fold_in(rng, n), example_logits, sampling_params)

  return jax.vmap(sample)(rngs, n_read, logits)
