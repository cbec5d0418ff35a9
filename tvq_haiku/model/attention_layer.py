"""The attention branch of a layer: norm, projections, attention, gate, output projection.

Letters: B batch, T tokens, H query heads, G key/value heads, K key width, V value width, D model
width, M memory length.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp

from tvq_haiku.attention import full, quantization, sharded, vq
from tvq_haiku.attention.state import (
  AttentionState,
  KeyValueState,
  initial_attention_state,
  initial_key_value_state,
)
from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import codebook_metrics, layers, quantizer
from tvq_haiku.ops import positions
from tvq_haiku.parallel import sharding
from tvq_haiku.types import Array


class LayerContext(NamedTuple):
  """Documents, padding and flags of a call, which all attention layers share."""

  doc_ids: Array | None  # [B, T] int32. None: one document
  lengths: Array | None  # [B] int32: tokens before the padding. None: no padding
  is_token: Array  # [B, T] bool: False for padding
  loss_mask: Array  # [B, T] f32
  is_training: bool  # enables dropout and the losses of the codebook
  with_metrics: bool  # enables metrics


State = AttentionState | KeyValueState


class BranchOutput(NamedTuple):
  """Outputs of an attention branch other than its activations."""

  state: State | None  # None for an encoder
  commit_loss: Array  # [] f32
  codebook_loss: Array  # [] f32: zero, with the gradient that updates the codebook
  metrics: dict[str, Array]  # [] f32 each; empty unless requested


class _Projected(NamedTuple):
  """Projections of the input, before normalization and scaling."""

  q: Array  # [B, T, H, K]
  k: Array  # [B, T, G, K]
  v: Array  # [B, T, G, V]
  gate: Array | None  # [B, T, H·V]; None: not gated


# Recomputing these in the backward pass is cheaper than keeping them: without the checkpoints, 10
# arrays [B, T, V] are kept instead of 6.
_silu = jax.checkpoint(jax.nn.silu)
_gated = jax.checkpoint(lambda values, gate: values * jax.nn.silu(gate))


def initial_state(config: TransformerConfig, batch_size: int) -> State:
  """Returns the state of one attention layer before the first token.

  Args:
    config: one of the `attention_configs` of the model's configuration.
    batch_size: B.
  """
  sizes = dict(
    batch_size=batch_size,
    n_kv_head=config.kv_heads,
    mem_len=config.mem_len,
    d_k=config.d_k,
    d_v=config.d_v,
    dtype=config.compute_dtype,
  )
  if config.attn_type == "full":
    return initial_key_value_state(**sizes)
  return initial_attention_state(n_code=config.n_code, **sizes)


class AttentionLayer(hk.Module):
  """Norm, projections, attention, gate and output projection, added to the input.

  The head type `shga` is gated, `mha` and `mqa` are not. Attention is over quantized keys (`vq`) or
  over plain keys (`full`).

  Args:
    config: one of the `attention_configs` of the model's configuration.
    name: name of the module.
  """

  def __init__(self, config: TransformerConfig, *, name: str = "attention"):
    super().__init__(name=name)
    self._config = config

  def __call__(
    self, x: Array, state: State, context: LayerContext, sequence_rng: Array | None
  ) -> tuple[Array, BranchOutput]:
    """Adds the branch to its input.

    Args:
      x: [B, T, D] in the policy's output dtype.
      state: the state of this layer.
      context: documents, padding and flags.
      sequence_rng: seed of the dropout masks that all windows of a sequence share. None: no
        dropout.

    Returns:
      [B, T, D], and the state, losses and metrics of the branch.
    """
    c = self._config
    B, T, D = x.shape
    chex.assert_equal(D, c.d_model)
    # 1. Normalize and project: q, k, v, and the gate.
    q, k, v, gate = self._project(layers.RMSNorm(name="norm")(x))
    # 2. Normalize queries and keys, and scale each by K^(-1/4), so that scores have K^(-1/2).
    scale = c.d_k**-0.25
    q = (layers.rms_normalize(q) * scale).astype(c.compute_dtype)
    k = layers.rms_normalize(k) * scale
    v = v.astype(c.compute_dtype)
    # 3. Attend.
    sin_rng, layer_rng = (None, None) if sequence_rng is None else jax.random.split(sequence_rng)
    biases = self._biases(scale, sin_rng, context.is_training)
    values, output = self._attend(q, k, v, biases, state, context)
    # 4. Gate, project, and add to the input.
    branch = values.reshape(B, T, c.n_head * c.d_v)  # [B, T, H·V]
    if gate is not None:
      branch = _gated(branch, gate)
    branch = layers.Projection(c.d_model, rows="model", name="out")(branch)
    x = layers.add_branch(
      x,
      branch,
      p_dropres=c.p_dropres,
      p_droplyr=c.p_droplyr,
      rng=layer_rng,
      is_training=context.is_training,
    )
    return x, output

  @hk.transparent
  def _project(self, x: Array) -> _Projected:
    """Projects normalized activations [B, T, D]; the mesh axis `model` splits heads or widths."""
    c = self._config
    B, T, _ = x.shape
    H, G, K, V = c.n_head, c.kv_heads, c.d_k, c.d_v
    heads = sharding.head_axes(G)[sharding.HEADS]
    q = layers.Projection(H * K, columns=(heads,), name="q")(x)
    if c.gated:
      widths, axes = (G * K, G * V, H * V), (heads, "model", "model")
      k, v, gate = layers.Projection(*widths, columns=axes, name="kvg")(x)
      v = _silu(v)
    else:
      k, v = layers.Projection(G * K, G * V, columns=(heads, "model"), name="kv")(x)
      gate = None
    return _Projected(q.reshape(B, T, H, K), k.reshape(B, T, G, K), v.reshape(B, T, G, V), gate)

  @hk.transparent
  def _biases(self, scale: float, rng: Array | None, is_training: bool) -> dict[str, Array]:
    """Returns content_bias and position_bias [H, K], and relative_keys, all times `scale`.

    The relative keys r_d [M+1, G, K] are projected sinusoids of the distances d = 0, ..., M. An
    encoder has [2M+1, G, K], for d = -M, ..., M.
    """
    c = self._config
    H, G, K = c.n_head, c.kv_heads, c.d_k
    content_bias, position_bias = (
      scale * hk.get_parameter(name, (H * K,), jnp.float32, init=jnp.zeros).reshape(H, K)
      for name in ("u", "v")  # the paper's names: v is w in `reference`
    )
    distances = jnp.arange(0 if c.causal else -c.mem_len, c.mem_len + 1, dtype=jnp.int32)
    table = positions.sinusoids(distances, width=c.d_model, lam=c.pe_lam)
    if is_training:
      table = layers.dropout(rng, c.p_dropsin, table)
    relative = layers.Projection(G * K, name="r")(table.astype(c.compute_dtype))
    return dict(
      relative_keys=scale * relative.reshape(-1, G, K),
      content_bias=content_bias,
      position_bias=position_bias,
    )

  @hk.transparent
  def _attend(
    self,
    q: Array,
    k: Array,
    v: Array,
    biases: dict[str, Array],
    state: State,
    context: LayerContext,
  ) -> tuple[Array, BranchOutput]:
    """Returns the values [B, T, H, V] of full or quantized attention, and the branch's output."""
    c = self._config
    settings = dict(
      segment_ids=context.doc_ids,
      lengths=context.lengths,
      block_len=c.block_len,
      is_causal=c.causal,
      scale=1.0,
      **biases,
    )
    if c.attn_type == "full":
      k = k.astype(c.compute_dtype)
      out = sharded.sharded_attention(full.full_attention, q, k, v, state=state, **settings)
      zero = jnp.zeros((), jnp.float32)
      return out.values, BranchOutput(out.state, zero, zero, {})
    vector_quantizer = quantizer.VectorQuantizer(
      n_head=c.kv_heads, n_code=c.n_code, d_k=c.d_k, gamma=c.c_gamma, name="quantizer"
    )
    out = sharded.sharded_attention(
      vq.vq_attention,
      q,
      k,
      v,
      vector_quantizer.codebook(),
      state=state if c.causal else None,
      mem_len=c.mem_len,
      reduction=c.reduction,
      agg_cache=c.agg_cache,
      grad_thru_cache=c.grad_thru_cache,
      remat=c.remat == "block",
      scan=hk.scan,
      **settings,
    )
    return out.values, self._branch_output(k, out, vector_quantizer, context)

  @hk.transparent
  def _branch_output(
    self,
    k: Array,
    out: vq.AttentionOutput,
    vector_quantizer: quantizer.VectorQuantizer,
    context: LayerContext,
  ) -> BranchOutput:
    """Returns state, losses (in training) and metrics (if requested) of quantized attention."""
    commit_loss = codebook_loss = jnp.zeros((), jnp.float32)
    metrics = {}
    if context.is_training or context.with_metrics:
      nearest = quantization.look_up(out.codes, vector_quantizer.codebook())  # C_z [B, T, G, K]
    if context.is_training:
      commit_loss = quantization.commit_loss(k, nearest, context.loss_mask)
      codebook_loss = vector_quantizer.surrogate_loss(
        k, out.codes, context.loss_mask, revive_below=self._config.c_revive
      )
    if context.with_metrics:
      metrics = codebook_metrics.codebook_metrics(
        vector_quantizer.codebook(), vector_quantizer.counts()
      )
      metrics |= codebook_metrics.quantization_metrics(
        k, nearest, context.is_token, self._config.block_len
      )
    return BranchOutput(out.state, commit_loss, codebook_loss, metrics)
