"""The Transformer-VQ: embeddings, N layers of two residual branches each, logits.

Letters: B batch, T tokens, D model width, X vocabulary, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import haiku as hk
import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import attention_layer, layers
from tvq_haiku.model import remat as remat_lib
from tvq_haiku.model.state import TransformerState, check_state, initial_state
from tvq_haiku.ops import padding
from tvq_haiku.parallel import sharding
from tvq_haiku.types import Array
from tvq_haiku.utils import checks

# Models of at most this many layers are unrolled, because a loop copies the activations that each
# layer keeps for the backward pass.
_MAX_UNROLLED_LAYERS = 4

# States of the two branches of one layer; None if the second branch is an MLP.
_LayerStates = tuple[attention_layer.State, attention_layer.State | None]


class TransformerOutput(NamedTuple):
  """The result of one call of the model."""

  logits: Array  # [B, T, X] f32: of the token that follows each input, multiplied by e_scale
  state: TransformerState  # after the T tokens
  commit_loss: Array  # [] f32: sum over heads, attentions and layers; 0 unless is_training
  codebook_loss: Array  # [] f32: always 0; its gradient updates the codebook's moving averages
  metrics: dict[str, Array]  # [] f32 each: means over attentions; empty unless with_metrics
  hidden: Array  # [B, T, D] compute dtype: the input of the output projection

  @property
  def logprobs(self) -> Array:
    """Log-probabilities of the token that follows each input, [B, T, X] f32."""
    return jax.nn.log_softmax(self.logits)


class Transformer(hk.Module):
  """The model, for use inside a function that `hk.transform` transforms."""

  def __init__(self, config: TransformerConfig, *, name: str = "transformer"):
    super().__init__(name=name)
    self._config = config

  def __call__(
    self,
    inputs: Array,
    state: TransformerState | None = None,
    *,
    doc_ids: Array | None = None,
    loss_mask: Array | None = None,
    is_training: bool = False,
    sequence_rng: Array | None = None,
    with_metrics: bool = False,
  ) -> TransformerOutput:
    """Reads T tokens, which follow those that `state` remembers.

    Args:
      inputs: tokens, [B, T] integers in [0, X); any T >= 1. With `no_emb`, the features of T
        tokens, [B, T, D] floating.
      state: from `initial_state` or a previous call; None: the initial state. An encoder
        (causal=False) does not use it and returns it unchanged: every call is a sequence of its
        own.
      doc_ids: [B, T] int32 document of each token. With `doc_mask`, tokens attend only to their own
        document, and absolute positions restart with each document. Negative ids mark padding,
        which may be anywhere: it is neither attended nor remembered, and its logits are undefined.
        None: there is no padding, and all tokens continue the document of the state.
      loss_mask: [B, T] weights of the tokens in the commitment loss and in the moving averages of
        the codebook. None: all ones.
      is_training: whether to apply dropout and to compute the losses of the quantizer.
      sequence_rng: key of the masks that all windows of a sequence share (dropout of sinusoids, and
        LayerDrop). None: drawn from the rng of the transform.
      with_metrics: whether to compute the metrics of the quantizer.

    Returns:
      A `TransformerOutput`.

    Raises:
      ValueError, TypeError: an argument has a wrong shape, dtype or range; the message names it.
    """
    c = self._config
    self._check_arguments(inputs, state, doc_ids, loss_mask)
    initial = initial_state(c, inputs.shape[0])
    state = initial if state is None else state
    start = state if c.causal else initial  # for an encoder, every call starts a new sequence
    batch = padding.compact(inputs, start.document, doc_ids, loss_mask)
    position_ids, document, position = padding.document_positions(
      batch, start.document, start.position, restart=c.doc_mask
    )
    context = attention_layer.LayerContext(
      doc_ids=batch.doc_ids if c.doc_mask else None,
      lengths=batch.lengths,
      is_token=batch.is_token,
      loss_mask=batch.loss_mask,
      is_training=is_training,
      with_metrics=with_metrics,
    )
    embedding = layers.TokenEmbedding(n_vocab=c.n_vocab, d_model=c.d_model, name="embedding")
    x = self._embed(embedding, batch.inputs, position_ids, is_training)
    x, branches = self._apply_layers(x, state, context, sequence_rng)
    x = padding.restore(x, batch)
    if c.causal:
      states = [branch.state for branch in branches]
      state = TransformerState(document, position, states[0], states[1] if c.gated else None)
    hidden = self._normalize(x)
    return TransformerOutput(
      logits=self._logits(embedding, hidden),
      state=state,
      commit_loss=sum(jnp.sum(branch.commit_loss) for branch in branches),
      codebook_loss=sum(jnp.sum(branch.codebook_loss) for branch in branches),
      metrics=_mean_metrics(branches),
      hidden=hidden,
    )

  def _check_arguments(
    self,
    inputs: Array,
    state: TransformerState | None,
    doc_ids: Array | None,
    loss_mask: Array | None,
  ) -> None:
    """Raises a ValueError or a TypeError that names the first wrong argument."""
    c = self._config
    if c.no_emb:
      checks.check_features("inputs", inputs, c.d_model)
    else:
      checks.check_tokens(inputs, c.n_vocab)
    checks.check_mask("doc_ids", doc_ids, inputs.shape[:2])
    checks.check_mask("loss_mask", loss_mask, inputs.shape[:2])
    if state is not None:
      check_state(state, c, inputs.shape[0])

  @hk.transparent
  def _embed(
    self, embedding: layers.TokenEmbedding, inputs: Array, position_ids: Array, is_training: bool
  ) -> Array:
    """Returns the input of the first layer, [B, T, D].

    Args:
      embedding: embeds tokens.
      inputs: tokens [B, T] or features [B, T, D].
      position_ids: [B, T] int32.
      is_training: whether to apply dropout.
    """
    c = self._config
    chex.assert_equal_shape_prefix([inputs, position_ids], 2)
    x = inputs.astype(jnp.float32) if c.no_emb else embedding(inputs)
    if c.pe_abs:
      x += layers.AbsolutePositions(width=c.d_model, lam=c.pe_lam, name="position")(position_ids)
    if is_training and c.p_dropemb:
      x = layers.dropout(hk.next_rng_key(), c.p_dropemb, x)
    return sharding.constrain(x.astype(c.policy.output_dtype), sharding.BATCH_AXES, "sequence")

  @hk.transparent
  def _apply_layers(
    self,
    x: Array,
    state: TransformerState,
    context: attention_layer.LayerContext,
    sequence_rng: Array | None,
  ) -> tuple[Array, tuple[attention_layer.BranchOutput, ...]]:
    """Applies the N layers as one scanned layer, so that compile time does not grow with N.

    Args:
      x: [B, T, D] output of the embedding.
      state: state of the model.
      context: documents, padding and masks of the batch.
      sequence_rng: see `__call__`.

    Returns:
      [B, T, D], and the outputs of the one or two attentions of a layer, stacked along N.
    """
    c = self._config
    rngs = None
    if context.is_training and (c.p_dropsin or c.p_droplyr):
      sequence_rng = hk.next_rng_key() if sequence_rng is None else sequence_rng
      rngs = jax.random.split(sequence_rng, (c.n_layer, 2))
    n_token = sharding.per_device(x.shape[0] * x.shape[1])
    config = c.replace(remat=remat_lib.resolve_remat(c, n_token))

    def layer(x: Array, states: _LayerStates, rngs: Array | None):
      return _apply_layer(config, x, states, context, rngs)

    stack = hk.layer_stack(
      c.n_layer,
      with_per_layer_inputs=True,
      unroll=c.n_layer if c.n_layer <= _MAX_UNROLLED_LAYERS else 1,
      name="layers",
    )
    with layers.mixed_precision(c.policy):
      return stack(remat_lib.remat_layer(layer, config.remat))(
        x, (state.attention_1, state.attention_2), rngs
      )

  @hk.transparent
  def _normalize(self, x: Array) -> Array:
    """Returns the input of the output projection: [B, T, D] in the compute dtype."""
    c = self._config
    chex.assert_shape(x, (None, None, c.d_model))
    if c.e_preln:
      x = layers.RMSNorm(name="norm")(x)
    return x.astype(c.compute_dtype)

  @hk.transparent
  def _logits(self, embedding: layers.TokenEmbedding, hidden: Array) -> Array:
    """Returns the logits of the next tokens: [B, T, D] -> [B, T, X] f32."""
    c = self._config
    unembed = embedding.logits if c.e_tie else layers.Unembedding(c.n_vocab, name="unembedding")
    return unembed(hidden) * c.e_scale


def _apply_layer(
  config: TransformerConfig,
  x: Array,
  states: _LayerStates,
  context: attention_layer.LayerContext,
  rngs: Array | None,
) -> tuple[Array, tuple[attention_layer.BranchOutput, ...]]:
  """Applies both residual branches of one layer.

  Args:
    config: configuration of the model; `remat` is not 'auto'.
    x: [B, T, D] residual stream.
    states: states of the layer's attentions; the second one is None if the second branch is an MLP.
    context: documents, padding and masks of the batch.
    rngs: [2] keys of the masks that all windows of a sequence share; None without dropout.

  Returns:
    [B, T, D], and the outputs of the one or two attentions.
  """
  rng_1, rng_2 = (None, None) if rngs is None else rngs
  configs = config.attention_configs
  first = attention_layer.AttentionLayer(configs[0], name="attention_1")
  x, output_1 = first(x, states[0], context, rng_1)
  if config.gated:
    second = attention_layer.AttentionLayer(configs[1], name="attention_2")
    x, output_2 = second(x, states[1], context, rng_2)
    return x, (output_1, output_2)
  x = layers.add_branch(
    x,
    layers.MLP(config.mlp_width, name="mlp")(x),
    p_dropres=config.p_dropres,
    p_droplyr=config.p_droplyr,
    rng=rng_2,
    is_training=context.is_training,
  )
  return x, (output_1,)


def _mean_metrics(branches: Sequence[attention_layer.BranchOutput]) -> dict[str, Array]:
  """Averages each metric over the attentions that have it: those over quantized keys."""
  quantized = [branch.metrics for branch in branches if branch.metrics]
  names = quantized[0] if quantized else ()
  return {name: jnp.mean(jnp.stack([m[name] for m in quantized])) for name in names}


def make_transformer(config: TransformerConfig) -> hk.Transformed:
  """Returns the model as a pair of pure functions, `init` and `apply`.

  Args:
    config: configuration of the model.

  Returns:
    `init(rng, inputs)` -> parameters, and `apply(params, rng, inputs, state=None, doc_ids=None,
    loss_mask=None, is_training=False, sequence_rng=None, with_metrics=False)` ->
    `TransformerOutput`. The arguments are those of `Transformer.__call__`; `rng` may be None
    without dropout.

  >>> config = TransformerConfig.tiny()
  >>> model = make_transformer(config)
  >>> tokens = jnp.zeros((1, 20), jnp.int32)
  >>> params = model.init(jax.random.key(0), tokens)
  >>> model.apply(params, None, tokens).logits.shape
  (1, 20, 259)
  """

  def forward(
    inputs: Array,
    state: TransformerState | None = None,
    doc_ids: Array | None = None,
    loss_mask: Array | None = None,
    is_training: bool = False,
    sequence_rng: Array | None = None,
    with_metrics: bool = False,
  ) -> TransformerOutput:
    return Transformer(config, name="transformer")(
      inputs,
      state,
      doc_ids=doc_ids,
      loss_mask=loss_mask,
      is_training=is_training,
      sequence_rng=sequence_rng,
      with_metrics=with_metrics,
    )

  return hk.transform(forward)


def zero_inputs(config: TransformerConfig, batch_size: int = 1, length: int = 1) -> Array:
  """Returns inputs of the model that are zero: tokens [B, T], or features [B, T, D] with `no_emb`.

  Args:
    config: configuration of the model.
    batch_size: B.
    length: T.

  >>> zero_inputs(TransformerConfig.tiny(no_emb=True), 2, 5).shape
  (2, 5, 32)
  """
  shape = (batch_size, length)
  if config.no_emb:
    return jnp.zeros((*shape, config.d_model), jnp.float32)
  return jnp.zeros(shape, jnp.int32)
