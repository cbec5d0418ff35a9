"""The Transformer-VQ: embeddings, N layers of two branches, logits.

Letters: B batch, T tokens, D model width, X vocabulary, N layers.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import attention_layer, layers
from tvq_haiku.model import remat as remat_lib
from tvq_haiku.ops import padding
from tvq_haiku.parallel import sharding
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import checks

_UNROLLED = 4  # layers
_SAVED = {"layer": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class TransformerState(NamedTuple):
  """What the model remembers: constant in size, whatever the length of the context."""

  document: Array  # [B] int32: the document of the last token; -1 before the first
  position: Array  # [B] int32: tokens read of it (of everything, with doc_mask=False)
  attention_1: attention_layer.State  # every field [N, ...]
  attention_2: attention_layer.State | None  # every field [N, ...]; None: an MLP is there instead


class TransformerOutput(NamedTuple):
  """What one call of the model returns."""

  logits: Array  # [B, T, X] f32, of the token that follows each input; e_scale included
  state: TransformerState
  commit_loss: Array  # [] f32: summed over heads, attentions and layers
  codebook_loss: Array  # [] f32: zero in value; its gradient moves the codebook
  metrics: dict[str, Array]  # scalars, averaged over attentions; empty unless asked for


def initial_state(config: TransformerConfig, batch_size: int) -> TransformerState:
  """The state before the first token.

  >>> config = TransformerConfig.tiny()
  >>> initial_state(config, 3).attention_1.cache_means.shape  # N, B, G, S, V
  (2, 3, 1, 16, 64)
  """
  if batch_size < 1:
    raise ValueError(f"initial_state: batch_size={batch_size} must be at least 1.")
  return _initial_state(config, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_state(config: TransformerConfig, batch_size: int) -> TransformerState:
  one = attention_layer.initial_state(config, batch_size)

  def stack() -> attention_layer.State:
    return jax.tree.map(lambda x: jnp.repeat(x[None], config.n_layer, axis=0), one)

  return TransformerState(
    document=jnp.full((batch_size,), -1, jnp.int32),
    position=jnp.zeros((batch_size,), jnp.int32),
    attention_1=stack(),
    attention_2=stack() if config.gated else None,
  )


def map_batch_axis(
  function: Callable[[Array, int], Array], state: TransformerState, *, first: int = 0
) -> TransformerState:
  """`function(field, axis of its rows)` of every field; axes count from `first`."""

  def fields(axis: int, part: Any) -> Any:
    return jax.tree.map(lambda x: function(x, axis), part)

  return TransformerState(
    *(fields(first, part) for part in state[:2]), *(fields(first + 1, part) for part in state[2:])
  )


class Transformer(hk.Module):
  """The model, for use inside a function that `hk.transform` transforms."""

  def __init__(self, config: TransformerConfig, *, name: str = "transformer"):
    super().__init__(name=name)
    self._config = config

  def __call__(
    self,
    tokens: Array,
    state: TransformerState,
    *,
    doc_ids: Array | None = None,
    loss_mask: Array | None = None,
    is_training: bool = False,
    sequence_rng: Array | None = None,
    with_metrics: bool = False,
  ) -> TransformerOutput:
    """Reads T tokens after those that `state` remembers.

    Args:
      tokens: [B, T] integers in [0, X); any T.
      state: from `initial_state` or a previous call. An encoder (causal=False) takes every call
        for a text of its own, and gives the state back as it was.
      doc_ids: [B, T] int32. With `doc_mask`, tokens attend their own document only, and absolute
        positions count from its start. Negative: padding, anywhere in a row; it is not attended
        or remembered, and its logits mean nothing. None: no padding, and all tokens continue the
        document of the state.
      loss_mask: [B, T] weights of the commit loss and of the codebook's averages. None: ones.
      is_training: switches dropout and the quantizer's losses on.
      sequence_rng: seeds sinusoid dropout and LayerDrop, whose masks all windows of a sequence
        share. None: drawn from the transform's rng.
      with_metrics: also compute `metrics`.

    Returns:
      A `TransformerOutput`.
    """
    c = self._config
    checks.check_tokens(tokens, c.n_vocab)
    checks.check_mask("doc_ids", doc_ids, tokens)
    checks.check_mask("loss_mask", loss_mask, tokens)
    checks.check_state(state, initial_state, c, tokens.shape[0])
    # To an encoder every call is a text of its own.
    before = state if c.causal else initial_state(c, tokens.shape[0])
    row = padding.compact(tokens, before.document, doc_ids, loss_mask)
    index, document, position = padding.document_positions(
      row, before.document, before.position, restart=c.doc_mask
    )
    context = attention_layer.LayerContext(
      doc_ids=row.doc_ids if c.doc_mask else None,
      lengths=row.lengths,
      is_token=row.is_token,
      loss_mask=row.loss_mask,
      is_training=is_training,
      with_metrics=with_metrics,
    )

    embedding = layers.TokenEmbedding(n_vocab=c.n_vocab, d_model=c.d_model, name="embedding")
    x = embedding(row.tokens)
    if c.pe_abs:
      x += layers.AbsolutePositions(width=c.d_model, lam=c.pe_lam, name="position")(index)
    if is_training and c.p_dropemb:
      x = layers.dropout(hk.next_rng_key(), c.p_dropemb, x)
    x = sharding.constrain(x.astype(c.policy.output_dtype), sharding.BATCH_AXES, "sequence")
    with layers.mixed_precision(c.policy):
      x, branches = self._layers(x, state, context, sequence_rng)
    x = padding.restore(x, row)
    if c.e_preln:
      x = layers.RMSNorm(name="norm")(x)
    x = x.astype(c.compute_dtype)
    unembed = embedding.logits if c.e_tie else layers.Unembedding(c.n_vocab, name="unembedding")
    return TransformerOutput(
      logits=unembed(x) * c.e_scale,
      state=state
      if not c.causal
      else TransformerState(
        document, position, branches[0].state, branches[1].state if c.gated else None
      ),
      commit_loss=sum(jnp.sum(branch.commit_loss) for branch in branches),
      codebook_loss=sum(jnp.sum(branch.codebook_loss) for branch in branches),
      metrics=jax.tree.map(lambda *x: jnp.mean(jnp.stack(x)), *(b.metrics for b in branches)),
    )

  @hk.transparent
  def _layers(
    self,
    x: Array,
    state: TransformerState,
    context: attention_layer.LayerContext,
    sequence_rng: Array | None,
  ):
    """N layers as one scanned layer: compile time does not grow with N."""
    c = self._config
    keys = None
    if context.is_training and (c.p_dropsin or c.p_droplyr):
      sequence_rng = hk.next_rng_key() if sequence_rng is None else sequence_rng
      keys = jax.random.split(sequence_rng, (c.n_layer, 2))

    n_token = sharding.per_device(x.shape[0] * x.shape[1])
    c = c.replace(remat=remat_lib.resolve_remat(c, n_token))

    def layer(x: Array, states, keys):
      first, second = (None, None) if keys is None else keys
      x, output = attention_layer.AttentionLayer(c, name="attention_1")(
        x, states[0], context, first
      )
      if not c.gated:
        return layers.add_branch(
          x,
          layers.MLP(c.mlp_width, name="mlp")(x),
          p_dropres=c.p_dropres,
          p_droplyr=c.p_droplyr,
          rng=second,
          is_training=context.is_training,
        ), (output,)
      x, other = attention_layer.AttentionLayer(c, name="attention_2")(
        x, states[1], context, second
      )
      return x, (output, other)

    # A few layers are unrolled: a loop would copy what each of them keeps for the backward pass.
    unroll = c.n_layer if c.n_layer <= _UNROLLED else 1
    stack = hk.layer_stack(c.n_layer, with_per_layer_inputs=True, unroll=unroll, name="layers")
    if c.remat in _SAVED:
      layer = hk.remat(layer, policy=_SAVED[c.remat])
    return stack(layer)(x, (state.attention_1, state.attention_2), keys)


def make_transformer(config: TransformerConfig) -> hk.Transformed:
  """The model as a pair of pure functions.

  `init(rng, tokens, state)` and `apply(params, rng, tokens, state, doc_ids=None, loss_mask=None,
  is_training=False, sequence_rng=None, with_metrics=False)`, as in `Transformer.__call__`.

  >>> config = TransformerConfig.tiny()
  >>> model = make_transformer(config)
  >>> tokens, state = jnp.zeros((1, 20), jnp.int32), initial_state(config, 1)
  >>> params = model.init(jax.random.key(0), tokens, state)
  >>> model.apply(params, None, tokens, state).logits.shape
  (1, 20, 259)
  """

  def forward(
    tokens,
    state,
    doc_ids=None,
    loss_mask=None,
    is_training=False,
    sequence_rng=None,
    with_metrics=False,
  ):
    return Transformer(config, name="transformer")(
      tokens,
      state,
      doc_ids=doc_ids,
      loss_mask=loss_mask,
      is_training=is_training,
      sequence_rng=sequence_rng,
      with_metrics=with_metrics,
    )

  return hk.transform(forward)


def params_shapes(config: TransformerConfig) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Shapes and types of all parameters of `make_transformer(config)`, without computing any.

  >>> shapes = params_shapes(TransformerConfig.tiny())
  >>> shapes["transformer/embedding"]["embeddings"].shape
  (259, 32)
  """
  return {module: dict(leaves) for module, leaves in _params_shapes(config).items()}


def check_params(params: Params, config: TransformerConfig) -> None:
  """Raises unless `params` holds exactly the parameters of `make_transformer(config)`.

  Args:
    params: module path -> parameter name -> array or `jax.ShapeDtypeStruct`.
    config: the model's configuration.

  Raises:
    ValueError: a parameter is missing, unknown or has a different shape. The message names the
      first one in alphabetical order, its shape and the expected shape.

  >>> config = TransformerConfig.tiny()
  >>> check_params(params_shapes(config), config.replace(d_model=16))
  Traceback (most recent call last):
  ValueError: params do not fit this config: transformer/embedding/embeddings has shape ...
  """

  def shapes_by_path(tree: Params) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(m, n): jnp.shape(x) for m, leaves in tree.items() for n, x in leaves.items()}

  shapes, expected = shapes_by_path(params), shapes_by_path(_params_shapes(config))
  for key in sorted(shapes.keys() | expected.keys()):
    if shapes.get(key) == expected.get(key):
      continue
    if key not in shapes:
      problem = f"is missing, expected shape {expected[key]}"
    elif key not in expected:
      problem = f"has shape {shapes[key]}, but this config has no such parameter"
    else:
      problem = f"has shape {shapes[key]}, expected {expected[key]}"
    raise ValueError(f"params do not fit this config: {'/'.join(key)} {problem}.")


@functools.cache
def _params_shapes(config: TransformerConfig) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:

  def init(rng):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return make_transformer(config).init(rng, tokens, initial_state(config, 1))

  return jax.eval_shape(init, jax.random.key(0))
