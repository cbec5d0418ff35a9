"""`decode_step`: one step of decoding, with inputs that the caller provides.

`generate` samples the tokens that it feeds to the model. Where the inputs come from somewhere else,
such as features of a sensor or tokens of another sampler, call `decode_step` for each of them.

Letters: B batch, D model width, X vocabulary.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.generation import decoder, decoder_weights
from tvq_haiku.generation.decoder import DecodeState
from tvq_haiku.generation.decoder_weights import DecoderWeights
from tvq_haiku.model import parameters, preconditions
from tvq_haiku.model import state as state_lib
from tvq_haiku.model.transformer import TransformerState
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import checks

State = TypeVar("State", TransformerState, DecodeState)


def decode_step(
  params: Params | DecoderWeights, config: TransformerConfig, inputs: Array, state: State
) -> tuple[Array, State]:
  """Reads one token per batch element, and computes the logits of the next one.

  The result is that of the model for T = 1. The token continues the document of the state; to start
  a new document, start from `initial_state`.

  Each call is one compiled program. For many steps, lay out the weights and the state once, as in
  the second example: otherwise every step converts them again. Inside a `jax.lax.scan`, or a
  function that is jitted with the state donated, the state is updated in place.

  Args:
    params: parameters of `make_transformer(config)`; or, faster, the result of `prepare_weights`.
    config: configuration of the model.
    inputs: tokens, [B] integers in [0, X); with `no_emb`, features [B, D].
    state: from `initial_state` or from a call of the model; or, faster, from `start_decoding`.

  Returns:
    The logits [B, X] f32, and the state after the token, which has the type of `state`.
    `finish_decoding` converts a `DecodeState` to the state that the model takes.

  Raises:
    ValueError: the model is an encoder, `params` or `state` do not fit it, or `inputs` have a wrong
      shape or value; the message names the argument.
    TypeError: `inputs` have a wrong dtype.

  >>> from tvq_haiku.model import transformer
  >>> config = TransformerConfig.tiny(no_emb=True)
  >>> model = transformer.make_transformer(config)
  >>> params = model.init(jax.random.key(0), transformer.zero_inputs(config))
  >>> features = jax.random.normal(jax.random.key(1), (7, 2, config.d_model))  # T, B, D
  >>> logits, state = decode_step(
  ...     params, config, features[0], transformer.initial_state(config, 2))
  >>> logits.shape, state.position.tolist()
  ((2, 259), [1, 1])

  >>> weights = decoder_weights.prepare_weights(params, config)
  >>> state = decoder.start_decoding(config, state)
  >>> for x in features[1:]:
  ...   logits, state = decode_step(weights, config, x, state)
  >>> decoder.finish_decoding(state).position.tolist()
  [7, 7]
  """
  preconditions.check_causal("decode_step", config)
  if not config.no_emb and getattr(inputs, "ndim", None) == 1:
    checks.check_tokens(inputs[:, None], config.n_vocab)
  return _decode_step(params, config, inputs, state)


@functools.partial(jax.jit, static_argnames="config")
def _decode_step(
  params: Params | DecoderWeights, config: TransformerConfig, inputs: Array, state: State
) -> tuple[Array, State]:
  """Checks the arguments, and computes one step. The checks run only while it is traced."""
  dims = chex.Dimensions(D=config.d_model)
  expected = ("BD", jnp.floating) if config.no_emb else ("B", jnp.integer)
  checks.check_arrays("decode_step", dims, inputs=(inputs, *expected))
  if isinstance(params, DecoderWeights):
    weights = params
    _check_weights(weights, config)
  else:
    parameters.check_params(params, config)
    weights = decoder_weights.prepare_weights(params, config)
  is_started = isinstance(state, DecodeState)
  as_model_state = jax.eval_shape(decoder.finish_decoding, state) if is_started else state
  state_lib.check_state(as_model_state, config, dims.B)
  start = state if is_started else decoder.start_decoding(config, state)
  active = jnp.ones(inputs.shape[:1], bool)
  logits, end = decoder.decode_token(weights, config, inputs, start, active)
  return logits, end if is_started else decoder.finish_decoding(end)


def _check_weights(weights: DecoderWeights, config: TransformerConfig) -> None:
  """Raises a ValueError unless the weights have the shapes that `config` needs."""
  expected = jax.eval_shape(
    functools.partial(decoder_weights.prepare_weights, config=config),
    parameters.params_shapes(config),
  )
  if jax.tree.map(jnp.shape, weights) != jax.tree.map(jnp.shape, expected):
    raise ValueError("decode_step: params are weights that were prepared with another config.")
