"""Decoding: runs the model one token at a time, and computes the same function as `Transformer`.

Letters: B batch, D model width, E outputs of a projection, X vocabulary, N layers, H query heads, G
key/value heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention import decode
from tvq_haiku.attention.compressive_cache import NO_DOCUMENT
from tvq_haiku.attention.state import AttentionState, KeyValueState
from tvq_haiku.config import TransformerConfig
from tvq_haiku.generation.decoder_weights import (
  AttentionWeights,
  DecoderWeights,
  LayerWeights,
  MLPWeights,
  NormWeights,
)
from tvq_haiku.model import layers, transformer
from tvq_haiku.ops import positions
from tvq_haiku.types import Array


class LayerBuffers(NamedTuple):
  """Ring buffers of one layer."""

  attention_1: decode.RingBuffer
  attention_2: decode.RingBuffer | None  # None: the layer has an MLP instead


class DecodeState(NamedTuple):
  """State of the model between two tokens: a `TransformerState` in the form of ring buffers."""

  document: Array  # [B] int32: document of the next token
  position: Array  # [B] int32: number of tokens read from the current document
  n_read: Array  # [B] int32: total number of tokens read
  n_written: Array  # [B] int32: number of tokens read since `start_decoding`
  buffers: tuple[LayerBuffers, ...]  # one for each of N layers


def start_decoding(config: TransformerConfig, state: transformer.TransformerState) -> DecodeState:
  """Converts a state of the model to ring buffers, from which decoding starts.

  Args:
    config: configuration of the model.
    state: result of a call of the model, or of `initial_state`.

  Returns:
    The state for the first call of `decode_token`.
  """
  chex.assert_equal_shape((state.document, state.position))
  is_new = state.document == NO_DOCUMENT
  n_read = state.attention_1.position[0]
  return DecodeState(
    document=jnp.maximum(state.document, 0),
    position=jnp.where(is_new, 0, state.position),
    n_read=n_read,
    n_written=jnp.zeros_like(n_read),
    buffers=tuple(
      LayerBuffers(_ring_buffer(state.attention_1, i), _ring_buffer(state.attention_2, i))
      for i in range(config.n_layer)
    ),
  )


def _ring_buffer(
  stacked: AttentionState | KeyValueState | None, layer: int
) -> decode.RingBuffer | None:
  """Returns the ring buffer of one layer from the states [N, ...] of all layers."""
  return None if stacked is None else decode.from_state(jax.tree.map(lambda x: x[layer], stacked))


@jax.jit
def finish_decoding(state: DecodeState) -> transformer.TransformerState:
  """Converts ring buffers back to a state, from which the model or `start_decoding` can continue.

  Args:
    state: from `start_decoding` or `decode_token`.

  Returns:
    The state that a call of the model on the same tokens returns.
  """
  return transformer.TransformerState(
    document=jnp.where(state.n_read > 0, state.document, NO_DOCUMENT),
    position=state.position,
    attention_1=_stacked_state([layer.attention_1 for layer in state.buffers], state),
    attention_2=_stacked_state([layer.attention_2 for layer in state.buffers], state),
  )


def _stacked_state(
  buffers: Sequence[decode.RingBuffer | None], state: DecodeState
) -> AttentionState | KeyValueState | None:
  """Returns the states [N, ...] of the ring buffers of N layers."""
  if buffers[0] is None:
    return None
  states = [
    decode.to_state(buffer, position=state.n_read, n_written=state.n_written) for buffer in buffers
  ]
  return jax.tree.map(lambda *fields: jnp.stack(fields), *states)


class _TokenContext(NamedTuple):
  """Properties of the current token, which the attentions of all layers use."""

  n_written: Array  # [] int32: number of earlier tokens written to each active ring buffer
  doc_id: Array  # [B] int32: document of the token
  active: Array  # [B] bool: see `decode_token`


def decode_token(
  weights: DecoderWeights,
  config: TransformerConfig,
  inputs: Array,
  state: DecodeState,
  active: Array,
) -> tuple[Array, DecodeState]:
  """Reads one token per batch element, and computes the logits of the next one.

  Args:
    weights: from `prepare_weights`.
    config: configuration of the model.
    inputs: tokens [B] int32 in [0, X), or features [B, D] with `no_emb`.
    state: from `start_decoding` or the previous step.
    active: [B] bool. Inactive batch elements keep their state, and their logits are undefined;
      they must stay inactive until `start_decoding` is called again.

  Returns:
    The logits [B, X] f32 of the next token, and the state after this one.
  """
  c = config
  chex.assert_equal_shape_prefix((inputs, active, state.document), 1)
  chex.assert_type((inputs, active), (float if c.no_emb else int, bool))
  context = _TokenContext(
    n_written=jnp.max(state.n_written),  # the same for all active batch elements
    doc_id=state.document if c.doc_mask else jnp.zeros_like(state.document),
    active=active,
  )
  if c.no_emb:
    x = inputs.astype(jnp.float32)
  else:
    x = layers.look_up_embeddings(weights.embeddings, inputs)
  if weights.position_scale is not None:
    x += weights.position_scale * positions.sinusoids(state.position, width=c.d_model, lam=c.pe_lam)
  x = x.astype(c.policy.output_dtype)
  buffers = []
  for layer, layer_buffers in zip(weights.layers, state.buffers, strict=True):
    x, new_buffers = _layer(layer, c, x, layer_buffers, context)
    buffers.append(new_buffers)
  if weights.norm is not None:
    x = _normalize(weights.norm, x)
  logits = _project(weights.unembedding, x, preferred_element_type=jnp.float32)
  logits = (logits + weights.logit_bias) * c.e_scale
  n_new = active.astype(jnp.int32)
  return logits, DecodeState(
    document=state.document,
    position=state.position + n_new,
    n_read=state.n_read + n_new,
    n_written=state.n_written + n_new,
    buffers=tuple(buffers),
  )


def _layer(
  weights: LayerWeights,
  config: TransformerConfig,
  x: Array,
  buffers: LayerBuffers,
  context: _TokenContext,
) -> tuple[Array, LayerBuffers]:
  """Applies one layer to activations [B, D]."""
  x, buffer_1 = _attention(weights.attention_1, config, x, buffers.attention_1, context)
  if weights.mlp is not None:
    return x + _mlp(weights.mlp, x), LayerBuffers(buffer_1, None)
  x, buffer_2 = _attention(weights.attention_2, config, x, buffers.attention_2, context)
  return x, LayerBuffers(buffer_1, buffer_2)


def _mlp(weights: MLPWeights, x: Array) -> Array:
  """Computes the MLP [B, D] without the residual."""
  hidden = jax.nn.relu(_project(weights.up, _normalize(weights.norm, x)))
  return _project(weights.down, hidden**2)


def _attention(
  weights: AttentionWeights,
  config: TransformerConfig,
  x: Array,
  buffer: decode.RingBuffer,
  context: _TokenContext,
) -> tuple[Array, decode.RingBuffer]:
  """Applies one attention with its residual to activations [B, D]; updates its ring buffer."""
  c = config
  H, G, K, V, B = c.n_head, c.kv_heads, c.d_k, c.d_v, x.shape[0]
  ends = [H * K, H * K + G * K, H * K + G * K + G * V]
  projected = _project(weights.qkv, _normalize(weights.norm, x))
  q, k, v, *gate = jnp.split(projected, ends if c.gated else ends[:2], axis=1)
  if c.gated:
    v = jax.nn.silu(v)
  q, k = (layers.rms_normalize(y.reshape(B, -1, K)) * K**-0.25 for y in (q, k))
  values, buffer = decode.decode_step(
    buffer,
    q.astype(c.compute_dtype),
    k,
    v.reshape(B, G, V).astype(c.compute_dtype),
    weights.decode_params,
    n_written=context.n_written,
    doc_id=context.doc_id,
    active=context.active,
    agg_cache=c.agg_cache,
  )
  branch = values.reshape(B, H * V)
  if c.gated:
    branch = branch * jax.nn.silu(gate[0])
  return x + _project(weights.out, branch).astype(x.dtype), buffer


def _normalize(weights: NormWeights, x: Array) -> Array:
  """Applies an RMSNorm to activations [B, D]; the result has the dtype of `x`."""
  return (layers.rms_normalize(x) * weights.gain + weights.offset).astype(x.dtype)


def _project(weights: Array, x: Array, *, preferred_element_type: jnp.dtype | None = None) -> Array:
  """Multiplies activations [B, D] by weights [E, D]; returns [B, E].

  The product is computed in the dtype of the weights. The result has that dtype, too, unless
  `preferred_element_type` is given, as in `jnp.einsum`.
  """
  chex.assert_shape(x, (None, weights.shape[1]))
  # CPUs compute [E, D] times [D, B] faster than [B, D] times [D, E]. The barrier keeps XLA from
  # merging the transposition into the product, which would bring back the slower one.
  transposed = jnp.einsum(
    "ed,bd->eb", weights, x.astype(weights.dtype), preferred_element_type=preferred_element_type
  )
  return jax.lax.optimization_barrier(transposed).T
