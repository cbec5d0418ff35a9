"""The model for one token at a time: the same function as `Transformer`, laid out for reading weights.

Letters: B batch, D model width, X vocabulary, N layers, H query heads, G key/value heads, M memory
length, W = M+1, S codes, K key width, V value width.

A decode step reads every weight and all of the state once, so it is as fast as memory. Hence each
layer has arrays of its own (a scan over stacked layers would copy its slice of them), in the
policy's compute dtype, with one row per output; and what does not depend on the token (the
codebook, the relative keys) is computed beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.attention import decode, quantization
from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import layers, transformer
from tvq_haiku.ops import positions
from tvq_haiku.types import Array


class Norm(NamedTuple):
  """Of an RMSNorm."""

  gain: Array  # [D] f32
  offset: Array  # [D] f32


class Attention(NamedTuple):
  """Weights of one attention."""

  norm: Norm
  into: Array  # [H·K + G·K + G·V (+ H·V), D]: q, k, v (and gate)
  keys: decode.DecodeParams
  out: Array  # [D, H·V]


class MLP(NamedTuple):
  """Weights of one MLP."""

  norm: Norm
  up: Array  # [F, D]
  down: Array  # [D, F]


class DecoderWeights(NamedTuple):
  """Of a whole model."""

  embeddings: Array  # [X, D]
  position_scale: Array | None  # []; None: no absolute positions
  layers: tuple[tuple[Attention, Attention | MLP], ...]
  norm: Norm | None
  logits: Array  # [X, D]
  bias: Array  # [X]


class DecodeState(NamedTuple):
  """What the model remembers between two tokens: a `TransformerState` whose memories are rings."""

  document: Array  # [B] int32
  position: Array  # [B] int32: tokens read of it
  read: Array  # [B] int32: tokens read in all
  written: Array  # [B] int32: tokens read since `start_decoding`
  rings: tuple[tuple[decode.RingBuffer, decode.RingBuffer | None], ...]  # of N layers


@functools.partial(jax.jit, static_argnums=0)
def prepare_weights(
  config: TransformerConfig, params: Mapping[str, Mapping[str, Array]]
) -> DecoderWeights:
  """Lays the parameters of `make_transformer(config)` out for decoding; once for any number of steps."""
  c, dtype = config, config.compute_dtype
  scale = c.d_k**-0.25
  table = positions.sinusoids(jnp.arange(c.mem_len, -1, -1), width=c.d_model, lam=c.pe_lam)

  def norm(leaves: Mapping[str, Array], layer: Any = ...) -> Norm:
    return Norm(leaves["gain"][layer], leaves["offset"][layer])

  def layer(name: str, i: int) -> Attention | MLP:
    under = f"transformer/layers/{name}"
    get = lambda module, leaf="kernel": params[f"{under}/{module}"][leaf][i]
    rows = lambda *modules: jnp.concatenate([get(m) for m in modules], axis=1).T.astype(dtype)
    normed = norm(params[f"{under}/norm"], i)
    if name == "mlp":
      return MLP(normed, rows("up"), rows("down"))
    relative = (table.astype(dtype) @ get("r").astype(dtype)).reshape(-1, c.kv_heads, c.d_k)
    codebook = None
    if c.attn_type == "vq":
      codebook = quantization.codebook_from_averages(
        get("quantizer", "c_sum"), get("quantizer", "c_count")
      )
    keys = decode.DecodeParams(
      *(scale * params[under][bias][i].reshape(c.n_head, c.d_k) for bias in "uv"),
      relative_keys=(scale * relative).astype(dtype).swapaxes(0, 1),
      codebook=codebook,
    )
    return Attention(normed, rows("q", "kvg" if c.gated else "kv"), keys, rows("out"))

  embedding = params["transformer/embedding"]
  logits, bias = embedding["embeddings"], embedding["output_bias"]
  if not c.e_tie:
    logits, bias = (params["transformer/unembedding"][leaf].T for leaf in ("kernel", "bias"))
  return DecoderWeights(
    embeddings=embedding["embeddings"],
    position_scale=params["transformer/position"]["scale"] if c.pe_abs else None,
    layers=tuple(
      (layer("attention_1", i), layer("attention_2" if c.gated else "mlp", i))
      for i in range(c.n_layer)
    ),
    norm=norm(params["transformer/norm"]) if c.e_preln else None,
    logits=logits.astype(dtype),
    bias=bias,
  )


def start_decoding(config: TransformerConfig, state: transformer.TransformerState) -> DecodeState:
  """The same memory, in rings."""

  def rings(states: Any, i: int) -> decode.RingBuffer | None:
    return None if states is None else decode.from_state(jax.tree.map(lambda x: x[i], states))

  document = jnp.maximum(state.document, 0)
  read = state.attention_1.position[0]
  return DecodeState(
    document,
    jnp.where(state.document < 0, 0, state.position),
    read,
    jnp.zeros_like(read),
    tuple(
      (rings(state.attention_1, i), rings(state.attention_2, i)) for i in range(config.n_layer)
    ),
  )


@jax.jit
def finish_decoding(state: DecodeState) -> transformer.TransformerState:
  """The inverse of `start_decoding`, after some tokens."""

  def stacked(rings: tuple[decode.RingBuffer | None, ...]) -> Any:
    if rings[0] is None:
      return None
    states = [decode.to_state(x, position=state.read, n_written=state.written) for x in rings]
    return jax.tree.map(lambda *x: jnp.stack(x), *states)

  document = jnp.where(state.read > 0, state.document, -1)
  return transformer.TransformerState(
    document, state.position, *(stacked(rings) for rings in zip(*state.rings))
  )


def decode_token(
  config: TransformerConfig,
  weights: DecoderWeights,
  tokens: Array,
  state: DecodeState,
  active: Array,
) -> tuple[Array, DecodeState]:
  """Reads one token of each row.

  Args:
    config: the model.
    weights: of `prepare_weights`.
    tokens: [B] int32.
    state: of `start_decoding`, or of the step before.
    active: [B] bool. A row that is not keeps its state, and its logits mean nothing; it can not
      become active again before a new `start_decoding`.

  Returns:
    logits [B, X] f32 of the next token, and the state after this one.
  """
  c = config
  document = state.document if c.doc_mask else jnp.zeros_like(state.document)
  # Active rows have all written equally often.
  settings = dict(n_written=jnp.max(state.written), doc_id=document, active=active)
  x = weights.embeddings[tokens]
  if weights.position_scale is not None:
    x += weights.position_scale * positions.sinusoids(state.position, width=c.d_model, lam=c.pe_lam)
  x = x.astype(c.policy.output_dtype)
  rings = []
  for (first, second), (ring_1, ring_2) in zip(weights.layers, state.rings):
    x, ring_1 = _attention(c, first, x, ring_1, **settings)
    if c.gated:
      x, ring_2 = _attention(c, second, x, ring_2, **settings)
    else:
      x += _product(second.down, jax.nn.relu(_product(second.up, _normed(second.norm, x))) ** 2)
    rings.append((ring_1, ring_2))
  if weights.norm is not None:
    x = _normed(weights.norm, x)
  logits = _product(weights.logits, x, preferred_element_type=jnp.float32) + weights.bias
  one = active.astype(jnp.int32)
  return logits * c.e_scale, DecodeState(
    state.document, state.position + one, state.read + one, state.written + one, tuple(rings)
  )


def _attention(
  config: TransformerConfig, weights: Attention, x: Array, memory: decode.RingBuffer, **settings
) -> tuple[Array, decode.RingBuffer]:
  c = config
  H, G, K, V, B = c.n_head, c.kv_heads, c.d_k, c.d_v, x.shape[0]
  widths = [H * K, G * K, G * V, H * V] if c.gated else [H * K, G * K, G * V]
  cuts = [sum(widths[:i]) for i in range(1, len(widths))]
  q, k, v, *gate = jnp.split(_product(weights.into, _normed(weights.norm, x)), cuts, axis=1)
  if c.gated:
    v = jax.nn.silu(v)
  q, k = (layers.rms_normalize(y.reshape(B, -1, K)) * K**-0.25 for y in (q, k))
  values, memory = decode.decode_step(
    memory,
    q.astype(c.compute_dtype),
    k,
    v.reshape(B, G, V).astype(c.compute_dtype),
    weights.keys,
    agg_cache=c.agg_cache,
    **settings,
  )
  branch = values.reshape(B, H * V)
  if c.gated:
    branch = branch * jax.nn.silu(gate[0])
  return x + _product(weights.out, branch).astype(x.dtype), memory


def _normed(norm: Norm, x: Array) -> Array:
  return (layers.rms_normalize(x) * norm.gain + norm.offset).astype(x.dtype)


def _product(weights: Array, x: Array, **settings) -> Array:
  """[E, D] by [B, D] -> [B, E]; settings of `jnp.einsum`."""
  # As [E, B], which CPUs compute faster, and turned only then: left to itself, XLA turns it back.
  rows = jnp.einsum("ed,bd->eb", weights, x.astype(weights.dtype), **settings)
  return jax.lax.optimization_barrier(rows).T
