"""One training step: a batch of sequences, updated window by window with carried state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tvq_haiku import inputs
from tvq_haiku import losses
from tvq_haiku import optimizers
from tvq_haiku import transformer
from tvq_haiku.config import TrainConfig, TransformerConfig

Array = jax.Array


class TrainState(NamedTuple):
  """What training changes."""

  params: Any
  opt_state: optax.OptState
  step: Array  # [] int32: updates made


TrainStep = Callable[[TrainState, losses.Batch, Array], tuple[TrainState, dict[str, Array]]]


def init_train_state(config: TransformerConfig, train_cfg: TrainConfig, rng: Array,
                     params: Any = None) -> TrainState:
  """Parameters and optimizer before the first update.

  Args:
    config: the model.
    train_cfg: the optimizer.
    rng: seeds the parameters.
    params: used instead of fresh ones; copied, because training steps donate their buffers.
  """
  if params is None:
    state = transformer.initial_state(config, 1)
    init = jax.jit(transformer.make_transformer(config).init)
    params = init(rng, jnp.zeros((1, 1), jnp.int32), state)
  else:
    inputs.check_params(params, transformer.params_shapes(config))
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
  opt_state = optimizers.make_optimizer(train_cfg).init(params)
  return TrainState(params, opt_state, jnp.zeros((), jnp.int32))


def make_train_step(config: TransformerConfig, train_cfg: TrainConfig, mesh: Any = None, *,
                    with_metrics: bool = False) -> TrainStep:
  """A function `(train_state, batch, rng) -> (train_state, metrics)`, compiled once.

  It cuts the batch [B, T] into T/update_len windows and makes one update on each; the model's
  state is carried from window to window, and gradients stop in between.

  Args:
    config: the model.
    train_cfg: optimizer and sizes; the batch must have them.
    mesh: reserved for a later version; must be None.
    with_metrics: report the quantizer's metrics too.

  Returns:
    The step. It donates `train_state`: keep the one it returns. `rng` may be the same key every
    time, for the number of the update is folded in. `metrics` maps names to [T/update_len] f32:
    `loss` (what is minimised), `loss_lm` (nats per unmasked token), `loss_commit`, `grad_norm`
    (before clipping, without the codebook), `learning_rate`, and the quantizer's.
  """
  if mesh is not None:
    raise ValueError(f"make_train_step: mesh={mesh!r} is reserved for a later version; use None.")
  optimizer = optimizers.make_optimizer(train_cfg)
  schedule = optimizers.learning_rate_schedule(train_cfg)
  n_updates = train_cfg.updates_per_step

  def update(carry, window, rng, sequence_rng):
    (params, opt_state, step), state = carry
    (loss, aux), gradients = jax.value_and_grad(
        lambda p: losses.training_loss(
            config, p, jax.random.fold_in(rng, step), window, state, sequence_rng=sequence_rng,
            with_metrics=with_metrics), has_aux=True)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    metrics = dict(loss=loss, loss_lm=aux.loss_lm, loss_commit=aux.loss_commit,
                   grad_norm=optimizers.weights_norm(gradients), learning_rate=schedule(step))
    params = optax.apply_updates(params, updates)
    return (TrainState(params, opt_state, step + 1), aux.state), metrics | aux.metrics

  def train_step(train_state: TrainState, batch: losses.Batch, rng: Array):
    rng, sequence_rng = jax.random.split(jax.random.fold_in(rng, train_state.step))
    windows = jax.tree.map(
        lambda x: x.reshape(x.shape[0], n_updates, -1).swapaxes(0, 1), dict(batch))
    state = transformer.initial_state(config, train_cfg.global_batch_size)
    (train_state, _), metrics = jax.lax.scan(
        lambda carry, window: update(carry, window, rng, sequence_rng),
        (train_state, state), windows, unroll=n_updates == 1)
    return train_state, metrics

  compiled = jax.jit(train_step, donate_argnums=0)

  def checked(train_state: TrainState, batch: losses.Batch, rng: Array):
    inputs.check_batch(batch, (train_cfg.global_batch_size, train_cfg.sequence_len), config.n_vocab)
    return compiled(train_state, batch, rng)

  checked.lower = compiled.lower  # for those who want the program: benchmarks, cost analysis
  return checked
