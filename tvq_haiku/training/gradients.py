"""Gradients of the training loss, of a whole batch or of its parts in turn."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import state as state_lib
from tvq_haiku.model import transformer
from tvq_haiku.training import losses, optimizers
from tvq_haiku.types import Array, Batch


def loss_gradients(
  config: TransformerConfig,
  params: Any,
  rng: Array,
  batch: Batch,
  state: transformer.TransformerState,
  *,
  n_part: int = 1,
  sequence_rng: Array | None = None,
  with_metrics: bool = False,
) -> tuple[Array, losses.LossAux, Any]:
  """The loss of one update window, what else was learned, and the gradients.

  Args:
    config: the model.
    params: its parameters.
    rng: seeds dropout.
    batch: [B, T].
    state: before it.
    n_part: compute B/n_part rows at a time, in so much less memory. But for dropout, whose masks
      are drawn part by part, and for rounding, the result is the same: losses are means of equal
      parts, and the codebook's moving averages take all of them together.
    sequence_rng: see `Transformer`.
    with_metrics: also compute the quantizer's metrics.
  """

  def part_gradients(batch, state, rng, sequence_rng):
    (loss, aux), gradients = jax.value_and_grad(
      lambda p: losses.training_loss(
        config, p, rng, batch, state, sequence_rng=sequence_rng, with_metrics=with_metrics
      ),
      has_aux=True,
    )(params)
    return loss, aux, gradients

  if n_part == 1:
    return part_gradients(batch, state, rng, sequence_rng)

  def one(i: Array, batch: Batch, state: transformer.TransformerState):
    keys = (None if key is None else jax.random.fold_in(key, i) for key in (rng, sequence_rng))
    loss, aux, gradients = part_gradients(batch, state, *keys)
    weight = jnp.sum(losses.loss_weights(batch))
    return (loss, aux.loss_commit, aux.metrics, gradients, aux.loss_lm * weight, weight), aux.state

  # Every n-th row is of one part, so that each device has as many rows of it.
  parts = (
    jnp.arange(n_part),
    jax.tree.map(lambda x: _deal(x, 0, n_part), dict(batch)),
    state_lib.map_batch_axis(lambda x, axis: _deal(x, axis, n_part), state),
  )
  totals, _ = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), totals)

  def step(totals, part):
    more, state = one(*part)
    return jax.tree.map(jnp.add, totals, more), state

  totals, state = jax.lax.scan(step, zeros, parts)
  *means, nats, weight = totals
  loss, commit, metrics, gradients = jax.tree.map(lambda x: x / n_part, means)
  loss_lm = nats / jnp.where(weight > 0.0, weight, 1.0)
  state = state_lib.map_batch_axis(_collect, state, first=1)
  # Each part pulled the averages all the way to its own share of the sums.
  gradients = optimizers.map_codebook(
    lambda mean, p: n_part * mean - (n_part - 1) * (1.0 - config.c_gamma) * p, gradients, params
  )
  return loss, losses.LossAux(state, loss_lm, commit, metrics), gradients


def _deal(x: Array, axis: int, n_part: int) -> Array:
  """[..., B, ...] -> [n, ..., B/n, ...]."""
  shape = (*x.shape[:axis], x.shape[axis] // n_part, n_part, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def _collect(x: Array, axis: int) -> Array:
  """The inverse of `_deal`; `axis` counts that of the parts."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])
