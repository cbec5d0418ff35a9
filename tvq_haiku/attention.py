"""One residual branch: norm, projections, quantized attention, gate, output projection."""

from __future__ import annotations

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from tvq_haiku import block_attention
from tvq_haiku import layers
from tvq_haiku import metrics
from tvq_haiku import positions
from tvq_haiku import quantizer
from tvq_haiku.config import TransformerConfig

Array = jax.Array


class BranchContext(NamedTuple):
  """What every attention of the model is told about the sequence."""

  doc_ids: Array | None  # [B, T] int32; None: one document
  lengths: Array | None  # [B] int32: real tokens, before the padding; None: all
  is_token: Array  # [B, T] bool: False for padding
  loss_mask: Array  # [B, T] f32
  is_training: bool
  with_metrics: bool


class BranchOutput(NamedTuple):
  """What a branch adds, beside the residual."""

  state: block_attention.AttentionState
  commit_loss: Array  # [] f32
  codebook_loss: Array  # [] f32
  metrics: dict[str, Array]  # scalars; empty unless asked for


class VQAttention(hk.Module):
  """Single- or multi-head gated attention (the paper's SHGA) over quantized keys."""

  def __init__(self, config: TransformerConfig, *, name: str = "attention"):
    super().__init__(name=name)
    self._config = config

  def __call__(self, x: Array, state: block_attention.AttentionState, context: BranchContext,
               sequence_rng: Array | None) -> tuple[Array, BranchOutput]:
    """Adds the branch to its input.

    Args:
      x: [B, T, D] in the policy's output dtype.
      state: of this attention.
      context: documents, padding and masks, shared by all attentions.
      sequence_rng: seeds the masks that all windows of a sequence share.

    Returns:
      [B, T, D], and the state and losses.
    """
    c = self._config
    B, T, _ = x.shape
    H, G = c.n_head, c.kv_heads
    normed = layers.RMSNorm(name="norm")(x)
    q = layers.Projection(H * c.d_k, name="q")(normed).reshape(B, T, H, c.d_k)
    k, v, gate = layers.Projection(G * c.d_k, G * c.d_v, H * c.d_v, name="kvg")(normed)
    k = k.reshape(B, T, G, c.d_k)
    # K^(-1/4) on both factors of every score makes the K^(-1/2) of a softmax.
    scale = c.d_k**-0.25
    q = (layers.rms_normalize(q) * scale).astype(c.compute_dtype)
    k = layers.rms_normalize(k) * scale
    u = scale * hk.get_parameter("u", (H * c.d_k,), jnp.float32, init=jnp.zeros)
    position_bias = scale * hk.get_parameter("v", (H * c.d_k,), jnp.float32, init=jnp.zeros)
    v = jax.nn.silu(v).reshape(B, T, G, c.d_v).astype(c.compute_dtype)

    sin_rng, layer_rng = (None, None) if sequence_rng is None else jax.random.split(sequence_rng)
    codebook = quantizer.VectorQuantizer(
        n_head=G, n_code=c.n_code, d_k=c.d_k, gamma=c.c_gamma, name="quantizer")
    out = block_attention.vq_attention(
        q, k, v, codebook.codebook(), state=state,
        relative_keys=scale * self._relative_keys(sin_rng, context.is_training),
        content_bias=u.reshape(H, c.d_k), position_bias=position_bias.reshape(H, c.d_k),
        segment_ids=context.doc_ids, lengths=context.lengths, block_len=c.block_len,
        reduction=c.reduction, scale=1.0, agg_cache=c.agg_cache, grad_thru_cache=c.grad_thru_cache,
        remat=c.remat == "block")
    branch = out.values.reshape(B, T, H * c.d_v) * jax.nn.silu(gate)
    branch = layers.Projection(c.d_model, name="out")(branch)
    if context.is_training:
      if c.p_dropres:
        branch = layers.dropout(hk.next_rng_key(), c.p_dropres, branch)
      branch = layers.dropout(layer_rng, c.p_droplyr, branch, rows=True)
    return x + branch, self._auxiliary(k, out, codebook, context)

  @hk.transparent
  def _relative_keys(self, rng: Array | None, is_training: bool) -> Array:
    """r_d [M+1, H, K], projected once a call."""
    c = self._config
    table = positions.sinusoids(jnp.arange(c.mem_len + 1), width=c.d_model, lam=c.pe_lam)
    if is_training:
      table = layers.dropout(rng, c.p_dropsin, table)
    table = table.astype(c.compute_dtype)
    return layers.Projection(c.kv_heads * c.d_k, name="r")(table).reshape(-1, c.kv_heads, c.d_k)

  @hk.transparent
  def _auxiliary(self, k: Array, out: block_attention.AttentionOutput,
                 codebook: quantizer.VectorQuantizer, context: BranchContext) -> BranchOutput:
    commit = surrogate = jnp.zeros(())
    values = {}
    if context.is_training or context.with_metrics:
      quantized = quantizer.look_up(out.codes, codebook.codebook())
    if context.is_training:
      commit = quantizer.commit_loss(k, quantized, context.loss_mask)
      surrogate = codebook.surrogate_loss(k, out.codes, context.loss_mask)
    if context.with_metrics:
      values = metrics.codebook_metrics(codebook.codebook(), codebook.counts())
      values |= metrics.quantization_metrics(
          k, quantized, context.is_token, self._config.block_len)
    return BranchOutput(out.state, commit, surrogate, values)
