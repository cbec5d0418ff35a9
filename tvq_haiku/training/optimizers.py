"""The paper's optimizers as optax transformations, with the codebook in a partition of its own.

Parameters of the N layers are stacked along a first axis, but every rule is about the parameter of
one layer: whether a vector decays, and what Adafactor factors, clips and scales.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tvq_haiku.config import TrainConfig

_CODEBOOK = ("c_sum", "c_count")
_LR_MIN_FRACTION = 0.1


def learning_rate_schedule(train_cfg: TrainConfig) -> optax.Schedule:
  """From 0 to lr_max over the warm-up, then down to a tenth of it.

  `cosine` and `linear` arrive there at n_max_step; `inv_sqrt` follows lr_max sqrt(warmup/update)
  and goes no lower.

  >>> schedule = learning_rate_schedule(
  ...     TrainConfig(lr_max=1.0, lr_schedule="linear", n_warmup_step=2, n_max_step=12))
  >>> [round(float(schedule(i)), 2) for i in (0, 1, 2, 7, 12, 99)]
  [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
  """
  peak, warmup, total = train_cfg.lr_max, train_cfg.n_warmup_step, train_cfg.n_max_step

  def shape(update: jax.Array) -> jax.Array:
    progress = jnp.clip((update - warmup) / (total - warmup), min=0.0, max=1.0)
    match train_cfg.lr_schedule:
      case "cosine":
        fraction = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
      case "linear":
        fraction = 1.0 - progress
      case "inv_sqrt":
        start = max(warmup, 1)
        return jnp.maximum(jnp.sqrt(start / jnp.maximum(update, start)), _LR_MIN_FRACTION)
    return _LR_MIN_FRACTION + (1.0 - _LR_MIN_FRACTION) * fraction

  def schedule(update: jax.Array) -> jax.Array:
    update = jnp.asarray(update, jnp.float32)
    return peak * jnp.minimum(update / max(warmup, 1) if warmup else 1.0, 1.0) * shape(update)

  return schedule


def is_codebook(module_name: str, name: str) -> bool:
  """Whether a parameter is one of the codebook's moving averages."""
  return name in _CODEBOOK and module_name.split("/")[-1] == "quantizer"


def is_stacked(module_name: str) -> bool:
  """Whether a module's parameters carry the layer axis."""
  return "/layers/attention_" in module_name


def _map_named(function, params: Any) -> Any:
  return {
    module: {name: function(module, name, value) for name, value in leaves.items()}
    for module, leaves in params.items()
  }


def map_codebook(function, gradients: Any, params: Any) -> Any:
  """`gradients` with `function(gradient, parameter)` for those of the codebook."""
  return _map_named(
    lambda module, name, value: (
      function(value, params[module][name]) if is_codebook(module, name) else value
    ),
    gradients,
  )


def _decay_mask(params: Any) -> Any:
  """True where weights decay: everything but vectors (a scalar does decay)."""

  def decays(module: str, name: str, value: Any) -> bool:
    if isinstance(value, optax.MaskedNode):
      return False
    return value.ndim - is_stacked(module) != 1

  return _map_named(decays, params)


def _per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies `rule` to N parameters where a leaf stacks the N layers, and to one elsewhere."""
  stacked = optax.GradientTransformation(
    init=jax.vmap(rule.init),
    update=lambda updates, state, params: jax.vmap(rule.update)(updates, state, params),
  )
  return optax.partition(
    {"stacked": stacked, "single": rule},
    lambda params: _map_named(
      lambda module, name, value: "stacked" if is_stacked(module) else "single", params
    ),
  )


def make_optimizer(train_cfg: TrainConfig) -> optax.GradientTransformation:
  """The optimizer of `train_cfg` for parameters of `make_transformer`.

  Gradients are clipped by the global norm of all but the codebook. Weight decay is decoupled, not
  multiplied by the learning rate, and leaves vectors alone. The codebook takes plain steps of
  size 1: its gradients are differences of moving averages (see `quantizer`).
  """
  schedule = learning_rate_schedule(train_cfg)
  match train_cfg.optimizer:
    case "adamw":
      rule = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-9, mu_dtype=jnp.float32),
        optax.scale_by_learning_rate(schedule),
      )
    case "lion":
      rule = optax.chain(
        optax.scale_by_lion(b1=0.95, b2=0.98, mu_dtype=jnp.bfloat16),
        optax.scale_by_learning_rate(schedule),
      )
    case "adafactor":
      rule = _per_layer(
        optax.adafactor(schedule, multiply_by_parameter_scale=True, clipping_threshold=1.0)
      )
  steps = [rule]
  if train_cfg.grad_clip is not None:
    steps.insert(0, optax.clip_by_global_norm(train_cfg.grad_clip))
  if train_cfg.wd_lam:
    steps.append(optax.add_decayed_weights(-train_cfg.wd_lam, mask=_decay_mask))
  return optax.partition(
    {"codebook": optax.sgd(1.0), "weights": optax.chain(*steps)},
    lambda params: _map_named(
      lambda module, name, value: "codebook" if is_codebook(module, name) else "weights", params
    ),
  )


def codebook_is_finite(gradients: Any) -> jax.Array:
  """Whether all of the codebook's gradients are."""
  return jnp.isfinite(
    sum(
      jnp.sum(value)
      for module, leaves in gradients.items()
      for name, value in leaves.items()
      if is_codebook(module, name)
    )
    + 0.0
  )


def weight_gradient_norm(gradients: Any) -> jax.Array:
  """The global norm that clipping sees: of all gradients but the codebook's."""
  return optax.tree.norm(
    [
      value
      for module, leaves in gradients.items()
      for name, value in leaves.items()
      if not is_codebook(module, name)
    ]
  )
