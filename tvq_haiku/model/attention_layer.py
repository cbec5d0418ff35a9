"""One residual branch: norm, projections, attention, gate, output projection."""

from __future__ import annotations

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from tvq_haiku.attention import full, quantization, sharded, vq
from tvq_haiku.attention import state as state_lib
from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import codebook_metrics, layers, quantizer
from tvq_haiku.ops import positions
from tvq_haiku.parallel import sharding
from tvq_haiku.types import Array


class LayerContext(NamedTuple):
  """What every attention of the model is told about the sequence."""

  doc_ids: Array | None  # [B, T] int32; None: one document
  lengths: Array | None  # [B] int32: real tokens, before the padding; None: all
  is_token: Array  # [B, T] bool: False for padding
  loss_mask: Array  # [B, T] f32
  is_training: bool
  with_metrics: bool


State = state_lib.AttentionState | state_lib.KeyValueState


class BranchOutput(NamedTuple):
  """What a branch adds, beside the residual."""

  state: State | None  # None from an encoder
  commit_loss: Array  # [] f32
  codebook_loss: Array  # [] f32
  metrics: dict[str, Array]  # scalars; empty unless asked for


# Cheaper computed again than kept: 4 of the 10 arrays [B, T, V] that a backward pass would hold.
_silu = jax.checkpoint(jax.nn.silu)
_gate = jax.checkpoint(lambda values, gate: values * jax.nn.silu(gate))


def initial_state(config: TransformerConfig, batch_size: int) -> State:
  """Of one attention."""
  sizes = dict(
    batch_size=batch_size,
    n_kv_head=config.kv_heads,
    mem_len=config.mem_len,
    d_k=config.d_k,
    d_v=config.d_v,
    dtype=config.compute_dtype,
  )
  if config.attn_type == "full":
    return state_lib.initial_key_value_state(**sizes)
  return state_lib.initial_attention_state(n_code=config.n_code, **sizes)


class AttentionLayer(hk.Module):
  """Attention of any number of heads, gated (the paper's SHGA) or not, quantized or full."""

  def __init__(self, config: TransformerConfig, *, name: str = "attention"):
    super().__init__(name=name)
    self._config = config

  def __call__(
    self, x: Array, state: State, context: LayerContext, sequence_rng: Array | None
  ) -> tuple[Array, BranchOutput]:
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
    heads = sharding.head_axes(G)[sharding.HEADS]
    normed = layers.RMSNorm(name="norm")(x)
    q = layers.Projection(H * c.d_k, columns=(heads,), name="q")(normed).reshape(B, T, H, c.d_k)
    if c.gated:
      k, v, gate = layers.Projection(
        G * c.d_k, G * c.d_v, H * c.d_v, columns=(heads, "model", "model"), name="kvg"
      )(normed)
      v = _silu(v)
    else:
      k, v = layers.Projection(G * c.d_k, G * c.d_v, columns=(heads, "model"), name="kv")(normed)
    # K^(-1/4) on both factors of every score makes the K^(-1/2) of a softmax.
    scale = c.d_k**-0.25
    q = (layers.rms_normalize(q) * scale).astype(c.compute_dtype)
    k = layers.rms_normalize(k.reshape(B, T, G, c.d_k)) * scale
    v = v.reshape(B, T, G, c.d_v).astype(c.compute_dtype)
    u, position_bias = (
      scale * hk.get_parameter(name, (H * c.d_k,), jnp.float32, init=jnp.zeros).reshape(H, c.d_k)
      for name in ("u", "v")
    )

    sin_rng, layer_rng = (None, None) if sequence_rng is None else jax.random.split(sequence_rng)
    settings = dict(
      relative_keys=scale * self._relative_keys(sin_rng, context.is_training),
      content_bias=u,
      position_bias=position_bias,
      segment_ids=context.doc_ids,
      lengths=context.lengths,
      block_len=c.block_len,
      is_causal=c.causal,
      scale=1.0,
    )
    if c.attn_type == "full":
      out = sharded.sharded_attention(
        full.full_attention, q, k.astype(c.compute_dtype), v, state=state, **settings
      )
      output = BranchOutput(out.state, jnp.zeros(()), jnp.zeros(()), {})
    else:
      codebook = quantizer.VectorQuantizer(
        n_head=G, n_code=c.n_code, d_k=c.d_k, gamma=c.c_gamma, name="quantizer"
      )
      out = sharded.sharded_attention(
        vq.vq_attention,
        q,
        k,
        v,
        codebook.codebook(),
        state=state if c.causal else None,
        mem_len=c.mem_len,
        reduction=c.reduction,
        agg_cache=c.agg_cache,
        grad_thru_cache=c.grad_thru_cache,
        remat=c.remat == "block",
        **settings,
      )
      output = self._auxiliary(k, out, codebook, context)
    branch = out.values.reshape(B, T, H * c.d_v)
    if c.gated:
      branch = _gate(branch, gate)
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
  def _relative_keys(self, rng: Array | None, is_training: bool) -> Array:
    """r_d [M+1, G, K], or from -M to M [2M+1, G, K] for an encoder, projected once a call."""
    c = self._config
    distances = jnp.arange(0 if c.causal else -c.mem_len, c.mem_len + 1)
    table = positions.sinusoids(distances, width=c.d_model, lam=c.pe_lam)
    if is_training:
      table = layers.dropout(rng, c.p_dropsin, table)
    table = table.astype(c.compute_dtype)
    return layers.Projection(c.kv_heads * c.d_k, name="r")(table).reshape(-1, c.kv_heads, c.d_k)

  @hk.transparent
  def _auxiliary(
    self,
    k: Array,
    out: vq.AttentionOutput,
    codebook: quantizer.VectorQuantizer,
    context: LayerContext,
  ) -> BranchOutput:
    commit = surrogate = jnp.zeros(())
    values = {}
    if context.is_training or context.with_metrics:
      quantized = quantization.look_up(out.codes, codebook.codebook())
    if context.is_training:
      commit = quantization.commit_loss(k, quantized, context.loss_mask)
      surrogate = codebook.surrogate_loss(
        k, out.codes, context.loss_mask, revive_below=self._config.c_revive
      )
    if context.with_metrics:
      values = codebook_metrics.codebook_metrics(codebook.codebook(), codebook.counts())
      values |= codebook_metrics.quantization_metrics(
        k, quantized, context.is_token, self._config.block_len
      )
    return BranchOutput(out.state, commit, surrogate, values)
