"""The training objective: cross-entropy + c_beta · commitment + the codebook's surrogate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import transformer
from tvq_haiku.types import Array, Batch


class LossAux(NamedTuple):
  """What `training_loss` returns beside the loss."""

  state: transformer.TransformerState
  loss_lm: Array  # [] f32: nats per unmasked token
  loss_commit: Array  # [] f32: summed over heads, attentions and layers
  metrics: dict[str, Array]  # of the quantizer; empty unless asked for


def token_nll(logits: Array, targets: Array) -> Array:
  """-log softmax(logits)[target], [B, T] float32 nats; NaN for a target out of range.

  >>> token_nll(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), jnp.int32)).round(3).tolist()  # log 4
  [[1.3860000371932983]]
  """
  logits = logits.astype(jnp.float32)
  index = jnp.where(targets < 0, logits.shape[-1], targets)[..., None]
  target = jnp.take_along_axis(logits, index, axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - target


def weighted_nll(logits: Array, targets: Array, weights: Array) -> Array:
  """Sum over [B, T] of weight · nll; where the weight is 0, logits and target may be anything."""
  # The target is replaced before the logarithm: NaN times 0 would still be NaN, in gradients too.
  nll = token_nll(logits, jnp.where(weights != 0.0, targets, 0))
  return jnp.sum(jnp.where(weights != 0.0, weights * nll, 0.0))


def training_loss(
  config: TransformerConfig,
  params: Any,
  rng: Array | None,
  batch: Batch,
  state: transformer.TransformerState,
  *,
  sequence_rng: Array | None = None,
  with_metrics: bool = False,
) -> tuple[Array, LossAux]:
  """The loss of one update window; differentiate it with respect to `params`.

  mean(loss_mask · nll) + c_beta · commit + codebook, the mean being over all B·T places.

  Args:
    config: the model.
    params: its parameters.
    rng: seeds dropout; may be None when all rates are 0.
    batch: `inputs` and `targets` [B, T]; optionally `doc_ids` and `loss_mask` [B, T].
    state: what was read before this window; gradients do not reach it.
    sequence_rng: see `Transformer`.
    with_metrics: also compute the quantizer's metrics.

  Returns:
    The loss, and what else was learned on the way.
  """
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
  mask = loss_weights(batch)
  total = weighted_nll(out.logits, batch["targets"], mask)
  loss = total / mask.size + config.c_beta * out.commit_loss + out.codebook_loss
  weight = jnp.sum(mask)
  loss_lm = total / jnp.where(weight > 0.0, weight, 1.0)
  return loss, LossAux(out.state, loss_lm, out.commit_loss, out.metrics)


def loss_weights(batch: Batch) -> Array:
  """`loss_mask` [B, T] in float32, ones if absent; padding (negative `doc_ids`) weighs nothing."""
  mask = batch.get("loss_mask")
  mask = jnp.ones(batch["targets"].shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
  doc_ids = batch.get("doc_ids")
  return mask if doc_ids is None else jnp.where(doc_ids >= 0, mask, 0.0)
