"""The training objective: cross-entropy + c_beta · commit loss + codebook loss.

Letters: B batch, T tokens, X vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import transformer
from tvq_haiku.types import Array, Batch, Params
from tvq_haiku.utils import checks


class LossAux(NamedTuple):
  """The second result of `training_loss`."""

  state: transformer.TransformerState  # after the window
  loss_lm: Array  # [] f32: nats per unmasked token
  loss_commit: Array  # [] f32: summed over heads, attentions and layers
  metrics: dict[str, Array]  # [] f32 metrics of the quantizers; empty unless requested


def token_nll(logits: Array, targets: Array) -> Array:
  """Returns -log softmax(logits)[target] in nats; NaN for a target outside of the vocabulary.

  Args:
    logits: [B, T, X] floating.
    targets: [B, T] integers.

  Returns:
    [B, T] float32.

  >>> token_nll(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), jnp.int32)).round(3).tolist()  # log 4
  [[1.3860000371932983]]
  """
  dims = chex.Dimensions()
  chex.assert_rank(logits, 3)
  dims["BTX"] = logits.shape
  chex.assert_shape(targets, dims["BT"])
  chex.assert_type([logits, targets], [jnp.floating, jnp.integer])
  logits = logits.astype(jnp.float32)
  # A negative index would count from the end of the vocabulary.
  index = jnp.where(targets < 0, logits.shape[-1], targets)[..., None]
  target = jnp.take_along_axis(logits, index, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - target


def weighted_nll(logits: Array, targets: Array, weights: Array) -> Array:
  """Returns the sum over all tokens of weight · nll.

  Args:
    logits: [B, T, X] floating.
    targets: [B, T] integers; ignored where the weight is 0.
    weights: [B, T] float32.

  Returns:
    [] float32.
  """
  chex.assert_equal_shape([targets, weights])
  # Ignored targets may be invalid. They are replaced, so that no NaN is computed at all.
  nll = token_nll(logits, jnp.where(weights != 0.0, targets, 0))
  return jnp.sum(jnp.where(weights != 0.0, weights * nll, 0.0))


def training_loss(
  params: Params,
  config: TransformerConfig,
  rng: Array | None,
  batch: Batch,
  state: transformer.TransformerState,
  *,
  sequence_rng: Array | None = None,
  with_metrics: bool = False,
) -> tuple[Array, LossAux]:
  """Computes the loss of one update window; differentiate it with respect to `params`.

  The loss is mean(loss_mask · nll) + c_beta · commit loss + codebook loss. The mean is over all B·T
  tokens, masked ones included.

  Args:
    params: parameters of the model.
    config: its configuration.
    rng: key for dropout; may be None if all dropout rates are 0.
    batch: `inputs` and `targets` [B, T] integers (with `no_emb`, `inputs` are features [B, T, D]);
      optionally `doc_ids` [B, T] integers, negative for padding, and `loss_mask` [B, T] weights.
    state: the model's state before this window; it gets no gradient.
    sequence_rng: key for the masks that all windows of a sequence share: see `Transformer`.
    with_metrics: also compute the metrics of the quantizers.

  Returns:
    The loss, [] float32, and a `LossAux`.

  Raises:
    ValueError: `inputs`, `targets`, a mask or the state have a wrong shape.
    TypeError: they have a wrong dtype.
  """
  inputs = ("BTD", jnp.floating) if config.no_emb else ("BT", jnp.integer)
  checks.check_arrays(
    "training_loss",
    chex.Dimensions(D=config.d_model),
    inputs=(batch["inputs"], *inputs),
    targets=(batch["targets"], "BT", jnp.integer),
  )
  out = transformer.make_transformer(config).apply(
    params,
    rng,
    batch["inputs"],
    jax.lax.stop_gradient(state),
    doc_ids=batch.get("doc_ids"),
    loss_mask=batch.get("loss_mask"),
    is_training=True,
    sequence_rng=sequence_rng,
    with_metrics=with_metrics,
  )
  weights = loss_weights(batch)
  total_nll = weighted_nll(out.logits, batch["targets"], weights)
  loss = total_nll / weights.size + config.c_beta * out.commit_loss + out.codebook_loss
  total_weight = jnp.sum(weights)
  loss_lm = total_nll / jnp.where(total_weight > 0.0, total_weight, 1.0)
  return loss, LossAux(out.state, loss_lm, out.commit_loss, out.metrics)


def loss_weights(batch: Batch) -> Array:
  """Returns the weight of each target in the loss: `loss_mask`, but 0 for padding.

  Args:
    batch: `targets` [B, T]; optionally `loss_mask` [B, T], ones if absent, and `doc_ids` [B, T],
      negative for padding.

  Returns:
    [B, T] float32.
  """
  mask = batch.get("loss_mask")
  mask = jnp.ones(batch["targets"].shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
  doc_ids = batch.get("doc_ids")
  return mask if doc_ids is None else jnp.where(doc_ids >= 0, mask, 0.0)
