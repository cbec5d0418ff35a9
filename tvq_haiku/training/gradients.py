"""Gradients of the training loss: of the complete batch, or accumulated over microbatches."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import state as state_lib
from tvq_haiku.training import losses, optimizers
from tvq_haiku.types import Array, Batch, Params


class LossGradients(NamedTuple):
  """The loss of one update window and its gradients."""

  loss: Array  # [] f32
  aux: losses.LossAux
  gradients: Params  # of the loss, with the shapes and dtypes of the parameters


class _MicrobatchSums(NamedTuple):
  """Sums over microbatches."""

  loss: Array  # [] f32
  loss_commit: Array  # [] f32
  metrics: dict[str, Array]  # [] f32
  gradients: Params
  nll: Array  # [] f32: total weighted nll in nats
  weight: Array  # [] f32: total weight of the targets


def loss_gradients(
  params: Params,
  config: TransformerConfig,
  rng: Array,
  batch: Batch,
  state: state_lib.TransformerState,
  *,
  n_microbatch: int = 1,
  sequence_rng: Array | None = None,
  with_metrics: bool = False,
) -> LossGradients:
  """Computes the loss of one update window and its gradients.

  Args:
    params: parameters of the model.
    config: its configuration.
    rng: key for dropout.
    batch: arrays [B, T]: see `losses.training_loss`.
    state: the model's state before this window.
    n_microbatch: number of microbatches, a divisor of B. Their gradients are computed one after the
      other and accumulated, so that activations need 1/n of the memory. The result is that of the
      complete batch, except for rounding and for dropout masks.
    sequence_rng: key for the masks that all windows of a sequence share: see `Transformer`.
    with_metrics: also compute the metrics of the quantizers.
  """

  def gradients_of(
    batch: Batch,
    state: state_lib.TransformerState,
    rng: Array,
    sequence_rng: Array | None,
  ) -> LossGradients:
    (loss, aux), gradients = jax.value_and_grad(
      lambda p: losses.training_loss(
        p, config, rng, batch, state, sequence_rng=sequence_rng, with_metrics=with_metrics
      ),
      has_aux=True,
    )(params)
    return LossGradients(loss, aux, gradients)

  if n_microbatch == 1:
    return gradients_of(batch, state, rng, sequence_rng)
  chex.assert_is_divisible(batch["inputs"].shape[0], n_microbatch)

  def microbatch_sums(
    index: Array, batch: Batch, state: state_lib.TransformerState
  ) -> tuple[_MicrobatchSums, state_lib.TransformerState]:
    rngs = (None if key is None else jax.random.fold_in(key, index) for key in (rng, sequence_rng))
    loss, aux, gradients = gradients_of(batch, state, *rngs)
    weight = jnp.sum(losses.loss_weights(batch))
    return _MicrobatchSums(
      loss, aux.loss_commit, aux.metrics, gradients, aux.loss_lm * weight, weight
    ), aux.state

  microbatches = (
    jnp.arange(n_microbatch, dtype=jnp.int32),
    jax.tree.map(lambda x: _split_batch(x, 0, n_microbatch), dict(batch)),
    state_lib.map_batch_axis(lambda x, axis: _split_batch(x, axis, n_microbatch), state),
  )
  shapes, _ = jax.eval_shape(microbatch_sums, *jax.tree.map(lambda x: x[0], microbatches))

  def accumulate(sums: _MicrobatchSums, microbatch: tuple):
    new, state = microbatch_sums(*microbatch)
    return jax.tree.map(jnp.add, sums, new), state

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  sums, state = jax.lax.scan(accumulate, zeros, microbatches)
  state = state_lib.map_batch_axis(_merge_batch, state, first=1)
  return _from_sums(sums, state, params, n_microbatch, config.c_gamma)


def _from_sums(
  sums: _MicrobatchSums,
  state: state_lib.TransformerState,
  params: Params,
  n: int,
  gamma: float,
) -> LossGradients:
  """Returns loss and gradients of the complete batch from sums over its n microbatches."""
  loss, loss_commit, metrics, gradients = jax.tree.map(lambda x: x / n, tuple(sums[:4]))
  loss_lm = sums.nll / jnp.where(sums.weight > 0.0, sums.weight, 1.0)
  # The gradient of a moving average p is (1-γ)(p - s), with s summed over all tokens of the batch.
  # Each microbatch computes it with its own part of s, so the mean over microbatches is
  # (1-γ)(p - s/n). The lambda computes the gradient from this mean.
  gradients = optimizers.map_codebook(
    lambda mean, p: n * mean - (n - 1) * (1.0 - gamma) * p, gradients, params
  )
  return LossGradients(loss, losses.LossAux(state, loss_lm, loss_commit, metrics), gradients)


def _split_batch(x: Array, axis: int, n: int) -> Array:
  """Splits the batch axis into n microbatches: [..., B, ...] -> [n, ..., B/n, ...].

  Microbatch i gets batch elements i, n+i, 2n+i, ...: since each device holds consecutive batch
  elements, all devices then have equally many of every microbatch.
  """
  shape = (*x.shape[:axis], x.shape[axis] // n, n, *x.shape[axis + 1 :])
  return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def _merge_batch(x: Array, axis: int) -> Array:
  """Inverts `_split_batch`; axis 0 of `x` is the microbatch, and `axis` its batch axis."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])
