"""One training step: a batch of sequences, updated window by window with carried state."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.model import codebook_metrics, transformer
from tvq_haiku.parallel import sharding
from tvq_haiku.training import gradients as gradients_lib
from tvq_haiku.training import optimizers
from tvq_haiku.types import Array, Batch
from tvq_haiku.utils import checks


class TrainState(NamedTuple):
  """What training changes."""

  params: Any
  opt_state: optax.OptState
  step: Array  # [] int32: updates made


TrainStep = Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]


def init_train_state(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  rng: Array,
  params: Any = None,
  *,
  mesh: jax.sharding.Mesh | str | None = None,
) -> TrainState:
  """Parameters and optimizer before the first update.

  Args:
    config: the model.
    train_cfg: the optimizer.
    rng: seeds the parameters.
    params: used instead of fresh ones; copied, because training steps donate their buffers.
    mesh: where all of it is born, already cut up by the rules of `sharding`, or a text for
      `sharding.make_mesh`; None: one device.
  """
  optimizer = optimizers.make_optimizer(train_cfg)
  mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
  if params is not None:
    transformer.check_params(params, config)

  def initial(rng: Array, params: Any) -> TrainState:
    if params is None:
      params = transformer.make_transformer(config).init(
        rng, jnp.zeros((1, 1), jnp.int32), transformer.initial_state(config, 1)
      )
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

  if mesh is not None:
    shardings = sharding.train_state_shardings(train_state_shapes(config, train_cfg), mesh)
    return jax.jit(initial, out_shardings=shardings)(rng, params)
  if params is None:
    return jax.jit(initial)(rng, None)
  return initial(rng, jax.tree.map(lambda x: jnp.array(x, copy=True), params))


@functools.cache
def train_state_shapes(config: TransformerConfig, train_cfg: TrainConfig) -> TrainState:
  """Shapes and types of a `TrainState`, without computing any."""
  return jax.eval_shape(lambda: init_train_state(config, train_cfg, jax.random.key(0)))


def make_train_step(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  mesh: jax.sharding.Mesh | str | None = None,
  *,
  with_metrics: bool = False,
) -> TrainStep:
  """A function `(train_state, batch, rng) -> (train_state, metrics)`, compiled once.

  It cuts the batch [B, T] into T/update_len windows and makes one update on each; the model's
  state is carried from window to window, and gradients stop in between. An update whose loss or
  gradients are not finite is skipped: parameters, optimizer and state stay what they were.

  Args:
    config: the model.
    train_cfg: optimizer and sizes; the batch must have them.
    mesh: devices to share the work, or a text for `sharding.make_mesh`. The result is that of one
      device but for rounding; the batch is global, as numpy arrays or by `sharding.put_batch`, and
      `train_state` is from `init_train_state` with the same mesh.
    with_metrics: report the quantizer's metrics too.

  Returns:
    The step. It donates `train_state`: keep the one it returns. `rng` may be the same key every
    time, for the number of the update is folded in. `metrics` maps names to [T/update_len] f32:
    `loss` (what is minimised), `loss_lm` (nats per unmasked token), `loss_commit`, `grad_norm`
    (before clipping, without the codebook), `learning_rate`, `skipped` (1 for an update that was),
    `code_perplexity` and `code_use` (see `metrics.codebook_use`), and the quantizer's.

  Raises:
    ValueError: sizes do not go together; the message names them.
  """
  mesh = sharding.make_mesh(mesh) if isinstance(mesh, str) else mesh
  check_sizes(config, train_cfg, mesh)
  n_updates = train_cfg.updates_per_step

  def train_step(train_state: TrainState, batch: Batch, rng: Array):
    with sharding.use_mesh(mesh):
      return all_windows(train_state, batch, rng)

  def all_windows(train_state: TrainState, batch: Batch, rng: Array):
    rng, sequence_rng = jax.random.split(jax.random.fold_in(rng, train_state.step))
    windows = jax.tree.map(
      lambda x: sharding.constrain(x, None, sharding.BATCH_AXES, "sequence"),
      _windows(batch, n_updates),
    )
    state = transformer.initial_state(config, train_cfg.global_batch_size)
    if mesh is not None:
      state = jax.lax.with_sharding_constraint(
        state, sharding.state_shardings(state, mesh, config.kv_heads)
      )
    (train_state, _), metrics = jax.lax.scan(
      lambda carry, window: _update(
        config, train_cfg, carry, window, rng, sequence_rng, with_metrics
      ),
      (train_state, state),
      windows,
      unroll=n_updates == 1,
    )
    return train_state, metrics

  placed = {}
  if mesh is not None:
    everywhere = sharding.replicated(mesh)
    states = sharding.train_state_shardings(train_state_shapes(config, train_cfg), mesh)
    rows = sharding.batch_sharding(mesh, train_cfg.global_batch_size)
    placed = dict(in_shardings=(states, rows, everywhere), out_shardings=(states, everywhere))
  compiled = jax.jit(train_step, donate_argnums=0, **placed)

  def checked(train_state: TrainState, batch: Batch, rng: Array):
    checks.check_batch(batch, (train_cfg.global_batch_size, train_cfg.sequence_len), config.n_vocab)
    return compiled(train_state, batch, rng)

  checked.lower = compiled.lower  # for those who want the program: benchmarks, cost analysis
  checked.n_compiled = compiled._cache_size  # how many programs it was, which should stay 1
  return checked


def replay_to_skipped(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  train_state: TrainState,
  batch: Batch,
  rng: Array,
) -> dict[str, Any] | None:
  """What the first update of a step that is skipped is given; None if there is no such update.

  Args:
    config: the model.
    train_cfg: as the step's.
    train_state: before the step; it is not donated.
    batch: of the step.
    rng: of the step.

  Returns:
    The arguments of `gradients.loss_gradients` and of `numerics.first_non_finite`.
  """
  rng, sequence_rng = jax.random.split(jax.random.fold_in(rng, train_state.step))
  update = jax.jit(_update, static_argnums=(0, 1))
  carry = (train_state, transformer.initial_state(config, train_cfg.global_batch_size))
  windows = _windows(batch, train_cfg.updates_per_step)
  for i in range(train_cfg.updates_per_step):
    window = {name: x[i] for name, x in windows.items()}
    before, state = carry
    carry, metrics = update(config, train_cfg, carry, window, rng, sequence_rng)
    if metrics["skipped"]:
      return dict(
        params=before.params,
        rng=jax.random.fold_in(rng, before.step),
        batch=window,
        state=state,
        sequence_rng=sequence_rng,
      )
  return None


def _windows(batch: Batch, n: int) -> dict[str, Array]:
  """[B, T] -> [n, B, T/n]."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0], n, -1).swapaxes(0, 1), dict(batch))


def _update(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  carry: Any,
  window: Batch,
  rng: Array,
  sequence_rng: Array,
  with_metrics: bool = False,
) -> tuple[Any, dict[str, Array]]:
  """One update of carry = (train state, the model's state) on one window."""
  before, state = carry
  params, _, step = before
  loss, aux, gradients = gradients_lib.loss_gradients(
    config,
    params,
    jax.random.fold_in(rng, step),
    window,
    state,
    n_part=train_cfg.n_accumulate,
    sequence_rng=sequence_rng,
    with_metrics=with_metrics,
  )
  updates, opt_state = optimizers.make_optimizer(train_cfg).update(
    gradients, before.opt_state, params
  )
  norm = optimizers.weight_gradient_norm(gradients)
  is_good = jnp.isfinite(loss) & jnp.isfinite(norm) & optimizers.codebook_is_finite(gradients)
  (params, opt_state), state = jax.tree.map(
    lambda new, old: jnp.where(is_good, new, old),
    ((optax.apply_updates(params, updates), opt_state), aux.state),
    (before[:2], state),
  )
  metrics = dict(
    loss=loss,
    loss_lm=aux.loss_lm,
    loss_commit=aux.loss_commit,
    grad_norm=norm,
    learning_rate=optimizers.learning_rate_schedule(train_cfg)(step),
    skipped=1.0 - is_good.astype(jnp.float32),
  )
  metrics |= codebook_metrics.codebook_usage(params) | aux.metrics
  return (TrainState(params, opt_state, step + 1), state), metrics


def check_sizes(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None,
) -> None:
  """Raises a ValueError that names them if sizes of model, batch and mesh do not go together."""
  if config.c_revive and train_cfg.n_accumulate > 1:
    raise ValueError(
      f"c_revive={config.c_revive} and n_accumulate={train_cfg.n_accumulate}: codes cannot "
      "be revived from parts of a batch. Use more devices, or leave one of them out."
    )
  sizes = {} if mesh is None else dict(mesh.shape)
  rows = sizes.get("data", 1) * sizes.get("fsdp", 1)
  if train_cfg.global_batch_size % (rows * train_cfg.n_accumulate):
    raise ValueError(
      f"mesh={sizes}: {rows} devices cannot share the rows of global_batch_size="
      f"{train_cfg.global_batch_size} with n_accumulate={train_cfg.n_accumulate} evenly."
    )
  heads, model = config.kv_heads, sizes.get("model", 1)
  if heads % model and config.d_v % model:
    raise ValueError(
      f"mesh={sizes}: {model} devices can share neither {heads} key/value heads nor "
      f"d_v={config.d_v} evenly."
    )
  pieces, span = sizes.get("sequence", 1), train_cfg.update_len
  if pieces > 1 and (
    config.attn_type != "vq"
    or span % (pieces * config.block_len)
    or span // pieces < config.mem_len
  ):
    raise ValueError(
      f"mesh={sizes}: update_len={span} in {pieces} pieces: each must be a multiple of block_len="
      f"{config.block_len} and at least mem_len={config.mem_len}, and attn_type={config.attn_type!r} must "
      "be 'vq'."
    )
