"""The parameters of a model, laid out for decoding.

Letters: D model width, X vocabulary, N layers, H query heads, G key/value heads, M memory length,
W = M+1, S codes, K key width, V value width, F hidden width of the MLP, E outputs of a projection.

A decoding step reads every weight once, so its speed is limited by memory bandwidth. For this
reason, every layer has its own arrays (a scan over stacked layers would copy each slice), and
projections are stored in the policy's compute dtype, with one row per output. The codebook and the
relative keys do not depend on the token, and are computed in advance.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention import decode, quantization
from tvq_haiku.config import TransformerConfig
from tvq_haiku.ops import positions
from tvq_haiku.types import Array, Params


class NormWeights(NamedTuple):
  """Weights of an RMSNorm."""

  gain: Array  # [D] f32
  offset: Array  # [D] f32


class AttentionWeights(NamedTuple):
  """Weights of one attention; projections and relative keys are in the compute dtype."""

  norm: NormWeights
  qkv: Array  # [H·K + G·K + G·V (+ H·V), D]: queries, keys, values (and gate)
  decode_params: decode.DecodeParams  # biases and relative keys scaled by K^(-1/4); codebook
  out: Array  # [D, H·V]


class MLPWeights(NamedTuple):
  """Weights of one MLP; projections are in the compute dtype."""

  norm: NormWeights
  up: Array  # [F, D]
  down: Array  # [D, F]


class LayerWeights(NamedTuple):
  """Weights of one layer: two gated attentions, or one attention and an MLP."""

  attention_1: AttentionWeights
  attention_2: AttentionWeights | None  # None: the layer has an MLP
  mlp: MLPWeights | None  # None: the layer has a second attention


class DecoderWeights(NamedTuple):
  """Weights of a model, from `prepare_weights`."""

  embeddings: Array | None  # [X, D] f32; None: the inputs are features
  position_scale: Array | None  # [] f32; None: the model has no absolute positions
  layers: tuple[LayerWeights, ...]  # one for each of N layers
  norm: NormWeights | None  # None: the model has no norm before the logits
  unembedding: Array  # [X, D] in the compute dtype
  logit_bias: Array  # [X] f32


@functools.partial(jax.jit, static_argnames="config")
def prepare_weights(params: Params, config: TransformerConfig) -> DecoderWeights:
  """Lays out the parameters of `make_transformer(config)` for decoding.

  Args:
    params: parameters of the model.
    config: configuration of the model.

  Returns:
    The weights, which `decode_token` takes.
  """
  c = config
  embedding = params.get("transformer/embedding")  # None: features, untied output
  if c.e_tie:
    unembedding, logit_bias = embedding["embeddings"], embedding["output_bias"]
  else:
    output = params["transformer/unembedding"]
    unembedding, logit_bias = output["kernel"].T, output["bias"]
  chex.assert_shape((unembedding, logit_bias), [(c.n_vocab, c.d_model), (c.n_vocab,)])
  final_norm = params.get("transformer/norm")
  return DecoderWeights(
    embeddings=None if c.no_emb else embedding["embeddings"],
    position_scale=params["transformer/position"]["scale"] if c.pe_abs else None,
    layers=tuple(_layer_weights(_parameters_of_layer(params, i), c) for i in range(c.n_layer)),
    norm=NormWeights(**final_norm) if c.e_preln else None,
    unembedding=unembedding.astype(c.compute_dtype),
    logit_bias=logit_bias,
  )


def _parameters_of_layer(params: Params, layer: int) -> Params:
  """Returns the parameters of one layer, without the layer axis and the prefix of their names."""
  prefix = "transformer/layers/"
  return {
    module.removeprefix(prefix): {name: x[layer] for name, x in leaves.items()}
    for module, leaves in params.items()
    if module.startswith(prefix)
  }


def _layer_weights(params: Params, config: TransformerConfig) -> LayerWeights:
  """Lays out the parameters of one layer, from `_parameters_of_layer`."""
  attentions = [
    _attention_weights(params, attention, f"attention_{i}")
    for i, attention in enumerate(config.attention_configs, start=1)
  ]
  return LayerWeights(
    attention_1=attentions[0],
    attention_2=attentions[1] if config.gated else None,
    mlp=None if config.gated else _mlp_weights(params, config),
  )


def _mlp_weights(params: Params, config: TransformerConfig) -> MLPWeights:
  """Lays out the parameters of the MLP of one layer."""
  up, down = (
    _rows_per_output(params[f"mlp/{name}"]["kernel"], config.compute_dtype)
    for name in ("up", "down")
  )
  chex.assert_shape((up, down), [(config.mlp_width, config.d_model), up.shape[::-1]])
  return MLPWeights(NormWeights(**params["mlp/norm"]), up, down)


def _attention_weights(params: Params, config: TransformerConfig, name: str) -> AttentionWeights:
  """Lays out the parameters of one attention.

  Args:
    params: from `_parameters_of_layer`.
    config: the one of the `attention_configs` that describes this attention.
    name: "attention_1" or "attention_2".
  """
  c, dtype = config, config.compute_dtype
  H, G, K = c.n_head, c.kv_heads, c.d_k
  kernels = {
    module: params[f"{name}/{module}"]["kernel"]
    for module in ("q", "kvg" if c.gated else "kv", "r", "out")
  }
  scale = K**-0.25
  distances = jnp.arange(c.mem_len, -1, -1, dtype=jnp.int32)
  sinusoids = positions.sinusoids(distances, width=c.d_model, lam=c.pe_lam).astype(dtype)
  relative_keys = (sinusoids @ kernels["r"].astype(dtype)).reshape(-1, G, K)  # [W, G, K]
  codebook = None
  if c.attn_type == "vq":
    averages = params[f"{name}/quantizer"]
    codebook = quantization.codebook_from_averages(averages["c_sum"], averages["c_count"])
  return AttentionWeights(
    norm=NormWeights(**params[f"{name}/norm"]),
    qkv=_rows_per_output(
      jnp.concatenate([kernels["q"], kernels["kvg" if c.gated else "kv"]], axis=1), dtype
    ),
    decode_params=decode.DecodeParams(
      content_bias=scale * params[name]["u"].reshape(H, K),
      position_bias=scale * params[name]["v"].reshape(H, K),
      relative_keys=(scale * relative_keys).astype(dtype).swapaxes(0, 1),
      codebook=codebook,
    ),
    out=_rows_per_output(kernels["out"], dtype),
  )


def _rows_per_output(kernel: Array, dtype: jnp.dtype) -> Array:
  """Transposes a kernel [D, E] to [E, D], and converts it to `dtype`."""
  return kernel.T.astype(dtype)
