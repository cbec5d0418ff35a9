"""The training step: one update per window of a batch, with the model's state carried along."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.model import codebook_metrics, parameters, transformer
from tvq_haiku.parallel import sharding
from tvq_haiku.training import gradients as gradients_lib
from tvq_haiku.training import optimizers, size_checks
from tvq_haiku.types import Array, Batch, OptState, Params
from tvq_haiku.utils import checks, value_checks

Metrics = dict[str, Array]


class TrainState(NamedTuple):
  """Parameters, optimizer state and update count: everything that training changes."""

  params: Params  # float32
  opt_state: OptState
  step: Array  # [] int32: number of updates so far, skipped ones included


class _Carry(NamedTuple):
  """State carried from one update to the next update of the same batch."""

  train_state: TrainState
  state: transformer.TransformerState  # the model's state after the windows so far


class _Rngs(NamedTuple):
  """Keys of one training step."""

  update: Array  # folded with the index of the update
  sequence: Array  # the same for all windows of a sequence


def init_train_state(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  rng: Array,
  params: Params | None = None,
  *,
  mesh: Mesh | str | None = None,
) -> TrainState:
  """Initializes the parameters and the optimizer.

  Args:
    config: configuration of the model.
    train_cfg: configuration of the optimizer.
    rng: key for the initial parameters.
    params: initial parameters; None: random ones. They are copied, because training steps donate
      their buffers.
    mesh: devices on which the state is created, sharded by the rules of `parallel.sharding`, or a
      text such as `data:8` (see `sharding.make_mesh`); None: one device.

  Returns:
    The state before the first update.

  Raises:
    ValueError: `params` do not fit `config`, or `mesh` is an invalid text.
    TypeError: `config` or `train_cfg` is not a configuration, or `rng` is not a key.
  """
  size_checks.check_configs("init_train_state", config, train_cfg)
  optimizer = optimizers.make_optimizer(train_cfg)
  mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
  if params is not None:
    parameters.check_params(params, config)
  else:
    rng = value_checks.check_key("init_train_state", rng)

  def initialize(rng: Array, params: Params | None) -> TrainState:
    if params is None:
      params = transformer.make_transformer(config).init(
        rng, transformer.zero_inputs(config), transformer.initial_state(config, 1)
      )
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

  if mesh is not None:
    shardings = sharding.train_state_shardings(train_state_shapes(config, train_cfg), mesh)
    return jax.jit(initialize, out_shardings=shardings)(rng, params)
  if params is None:
    return jax.jit(initialize)(rng, None)
  return initialize(rng, jax.tree.map(lambda x: jnp.array(x, copy=True), params))


@functools.cache
def train_state_shapes(config: TransformerConfig, train_cfg: TrainConfig) -> TrainState:
  """Returns the shapes and dtypes of a `TrainState` without computing one."""
  return jax.eval_shape(lambda: init_train_state(config, train_cfg, jax.random.key(0)))


def make_train_step(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  mesh: Mesh | str | None = None,
  *,
  with_metrics: bool = False,
) -> TrainStep:
  """Returns a compiled function `(train_state, batch, rng) -> (train_state, metrics)`.

  It splits the sequences of a batch [B, T] into T/update_len windows and makes one update per
  window. The model's state is carried from window to window; gradients are not. An update whose
  loss or gradients are not finite is skipped: parameters, optimizer and the model's state keep
  their values.

  Args:
    config: configuration of the model.
    train_cfg: configuration of the optimizer, and the size of the batch.
    mesh: devices that share the work, or a text such as `data:8` (see `sharding.make_mesh`); None:
      one device. The result does not depend on the mesh, except for rounding.
    with_metrics: also return the metrics of the quantizers.

  Returns:
    A `TrainStep`.

  Raises:
    ValueError: the sizes of model, batch and mesh are incompatible: see `size_checks`.
    TypeError: `config` or `train_cfg` is not a configuration.
  """
  size_checks.check_configs("make_train_step", config, train_cfg)
  mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
  size_checks.check_sizes(config, train_cfg, mesh)
  return TrainStep(config, train_cfg, mesh, with_metrics=with_metrics)


class TrainStep:
  """A compiled training step on a batch of sequences; created by `make_train_step`."""

  def __init__(
    self,
    config: TransformerConfig,
    train_cfg: TrainConfig,
    mesh: Mesh | None,
    *,
    with_metrics: bool,
  ):
    self._config, self._train_cfg, self._mesh = config, train_cfg, mesh
    self._with_metrics = with_metrics
    shardings = {}
    if mesh is not None:
      replicated = sharding.replicated(mesh)
      states = sharding.train_state_shardings(train_state_shapes(config, train_cfg), mesh)
      tokens = sharding.batch_sharding(mesh, train_cfg.global_batch_size)
      shardings = dict(
        in_shardings=(states, tokens, replicated), out_shardings=(states, replicated)
      )
    self._compiled = jax.jit(self._step, donate_argnums=0, **shardings)

  def __call__(
    self, train_state: TrainState, batch: Batch, rng: Array
  ) -> tuple[TrainState, Metrics]:
    """Makes T/update_len updates.

    Args:
      train_state: from `init_train_state` with the same mesh, or from the previous step. It is
        donated: use the returned one afterwards.
      batch: name -> [B, T] array of the global batch, with B = global_batch_size and
        T = sequence_len (`inputs` are [B, T, D] with `no_emb`); with a mesh, numpy arrays or the
        result of `sharding.put_batch`.
      rng: key for dropout. The index of the update is folded in, so all steps may use the same key.

    Returns:
      The new train state, and metrics of shape [T/update_len] float32, one value per update:
      `loss` (the objective), `loss_lm` (nats per unmasked token), `loss_commit`, `grad_norm`
      (before clipping, without the codebooks), `learning_rate`, `skipped` (1 for a skipped update),
      `code_perplexity` and `code_use` (see `codebook_metrics.codebook_usage`), and those of the
      quantizers.

    Raises:
      ValueError, TypeError: the batch has wrong names, shapes or dtypes, or `rng` is not a key.
    """
    rng = value_checks.check_key("make_train_step", rng)
    shape = (self._train_cfg.global_batch_size, self._train_cfg.sequence_len)
    n_feature = self._config.d_model if self._config.no_emb else None
    checks.check_batch(batch, shape, self._config.n_vocab, n_feature=n_feature)
    return self._compiled(train_state, batch, rng)

  def lower(self, train_state: TrainState, batch: Batch, rng: Array) -> jax.stages.Lowered:
    """Lowers the step for arguments, or their shapes, without running it.

    Args:
      train_state: see `__call__`.
      batch: see `__call__`.
      rng: see `__call__`.
    """
    return self._compiled.lower(train_state, batch, rng)

  def n_compiled(self) -> int:
    """Returns how often the step was compiled: more than once is a bug, since shapes are fixed."""
    return self._compiled._cache_size()

  def _step(self, train_state: TrainState, batch: Batch, rng: Array) -> tuple[TrainState, Metrics]:
    config, train_cfg, mesh = self._config, self._train_cfg, self._mesh
    with sharding.use_mesh(mesh):
      rngs = _step_rngs(rng, train_state)
      windows = jax.tree.map(
        lambda x: sharding.constrain(x, None, sharding.BATCH_AXES, "sequence"),
        _split_windows(batch, train_cfg.updates_per_step),
      )
      state = transformer.initial_state(config, train_cfg.global_batch_size)
      if mesh is not None:
        state = jax.lax.with_sharding_constraint(
          state, sharding.state_shardings(state, mesh, config.kv_heads)
        )
      carry, metrics = jax.lax.scan(
        lambda carry, window: _update(
          config, train_cfg, carry, window, rngs, with_metrics=self._with_metrics
        ),
        _Carry(train_state, state),
        windows,
        unroll=train_cfg.updates_per_step == 1,
      )
    return carry.train_state, metrics


def replay_to_skipped(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  train_state: TrainState,
  batch: Batch,
  rng: Array,
) -> dict[str, Any] | None:
  """Repeats a step up to its first skipped update and returns the inputs of that update.

  Args:
    config: configuration of the model.
    train_cfg: configuration of the step.
    train_state: state before the step; it is not donated.
    batch: batch of the step.
    rng: key of the step.

  Returns:
    Keyword arguments of `gradients.loss_gradients` and `nan_debug.first_non_finite`; None if no
    update is skipped.
  """
  rngs = _step_rngs(rng, train_state)
  update = jax.jit(_update, static_argnums=(0, 1))
  carry = _Carry(train_state, transformer.initial_state(config, train_cfg.global_batch_size))
  windows = _split_windows(batch, train_cfg.updates_per_step)
  for i in range(train_cfg.updates_per_step):
    window = {name: x[i] for name, x in windows.items()}
    before = carry
    carry, metrics = update(config, train_cfg, before, window, rngs)
    if metrics["skipped"]:
      return dict(
        params=before.train_state.params,
        rng=jax.random.fold_in(rngs.update, before.train_state.step),
        batch=window,
        state=before.state,
        sequence_rng=rngs.sequence,
      )
  return None


def _step_rngs(rng: Array, train_state: TrainState) -> _Rngs:
  return _Rngs(*jax.random.split(jax.random.fold_in(rng, train_state.step)))


def _split_windows(batch: Batch, n: int) -> dict[str, Array]:
  """Splits sequences into n windows: [B, T, ...] -> [n, B, T/n, ...]."""
  chex.assert_equal_shape_prefix(list(batch.values()), 2)

  def split(x: Array) -> Array:
    B, T, *width = x.shape
    return x.reshape(B, n, T // n, *width).swapaxes(0, 1)

  return jax.tree.map(split, dict(batch))


def _update(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  carry: _Carry,
  window: Batch,
  rngs: _Rngs,
  *,
  with_metrics: bool = False,
) -> tuple[_Carry, Metrics]:
  """Makes one update on a window [B, T/n]."""
  params, opt_state, step = carry.train_state
  loss, aux, gradients = gradients_lib.loss_gradients(
    params,
    config,
    jax.random.fold_in(rngs.update, step),
    window,
    carry.state,
    n_microbatch=train_cfg.n_accumulate,
    sequence_rng=rngs.sequence,
    with_metrics=with_metrics,
  )
  updates, new_opt_state = optimizers.make_optimizer(train_cfg).update(gradients, opt_state, params)
  norm = optimizers.weight_gradient_norm(gradients)
  is_finite = jnp.isfinite(loss) & jnp.isfinite(norm) & optimizers.codebook_is_finite(gradients)
  params, opt_state, state = jax.tree.map(
    lambda new, old: jnp.where(is_finite, new, old),
    (optax.apply_updates(params, updates), new_opt_state, aux.state),
    (params, opt_state, carry.state),
  )
  metrics = dict(
    loss=loss,
    loss_lm=aux.loss_lm,
    loss_commit=aux.loss_commit,
    grad_norm=norm,
    learning_rate=optimizers.learning_rate_schedule(train_cfg)(step),
    skipped=1.0 - is_finite.astype(jnp.float32),
  )
  metrics |= codebook_metrics.codebook_usage(params) | aux.metrics
  return _Carry(TrainState(params, opt_state, step + 1), state), metrics
