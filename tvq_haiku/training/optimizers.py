"""The paper's optimizers as optax transformations, with a separate partition for the codebook.

The parameters of the N layers are stacked along a leading layer axis, but optimizers treat them as
N separate parameters. Weight decay, which skips vectors, and Adafactor, which factors, clips and
scales each parameter, see the shape of the parameter of a single layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from tvq_haiku.config import TrainConfig
from tvq_haiku.types import Array, Params

Leaf = TypeVar("Leaf")

_CODEBOOK = ("c_sum", "c_count")
_LR_MIN_FRACTION = 0.1  # the final learning rate as a fraction of lr_max


def learning_rate_schedule(train_cfg: TrainConfig) -> optax.Schedule:
  """Returns the learning rate as a function of the update index.

  It grows linearly from 0 to lr_max over n_warmup_step updates, and then decays to 0.1·lr_max:
  `cosine` and `linear` reach that value at n_max_step; `inv_sqrt` is
  lr_max · sqrt(n_warmup_step / update), but at least that value. After n_max_step, the rate no
  longer changes. (The schedule named inv_sqrt in the paper's code is a polynomial of power -0.5
  whose rate grows; none of its launch scripts uses it.)

  >>> schedule = learning_rate_schedule(
  ...     TrainConfig(lr_max=1.0, lr_schedule="linear", n_warmup_step=2, n_max_step=12))
  >>> [round(float(schedule(i)), 2) for i in (0, 1, 2, 7, 12, 99)]
  [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
  """
  peak, warmup, total = train_cfg.lr_max, train_cfg.n_warmup_step, train_cfg.n_max_step

  def decay(update: Array) -> Array:
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

  def schedule(update: Array) -> Array:
    update = jnp.minimum(jnp.asarray(update, jnp.float32), total)
    return peak * jnp.minimum(update / max(warmup, 1) if warmup else 1.0, 1.0) * decay(update)

  return schedule


def is_codebook(module_name: str, name: str) -> bool:
  """Returns whether a parameter is one of a codebook's moving averages."""
  return name in _CODEBOOK and module_name.split("/")[-1] == "quantizer"


def is_stacked(module_name: str) -> bool:
  """Returns whether the parameters of a module have a leading layer axis [N, ...]."""
  return "/layers/attention_" in module_name


def _map_named(
  function: Callable[[str, str, Array], Leaf], params: Params
) -> dict[str, dict[str, Leaf]]:
  """Replaces each parameter by `function(module path, parameter name, value)`."""
  return {
    module: {name: function(module, name, value) for name, value in leaves.items()}
    for module, leaves in params.items()
  }


def map_codebook(
  function: Callable[[Array, Array], Array], gradients: Params, params: Params
) -> Params:
  """Replaces the gradients of the codebooks.

  Args:
    function: maps (gradient, parameter) to the new gradient.
    gradients: gradients of all parameters.
    params: all parameters.

  Returns:
    `gradients`, with those of the codebooks replaced.
  """
  return _map_named(
    lambda module, name, value: (
      function(value, params[module][name]) if is_codebook(module, name) else value
    ),
    gradients,
  )


def _decay_mask(params: Params) -> dict[str, dict[str, bool]]:
  """Returns True for each parameter with weight decay: for all but vectors, so for scalars, too."""

  def decays(module: str, name: str, value: Array | optax.MaskedNode) -> bool:
    if isinstance(value, optax.MaskedNode):
      return False
    return value.ndim - is_stacked(module) != 1

  return _map_named(decays, params)


def _per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
  """Applies `rule` to each layer of stacked parameters, and to other parameters as they are."""
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
  """Returns the optimizer of `train_cfg` for the parameters of `make_transformer`.

  Gradients are clipped by the global norm of all gradients except those of the codebooks. Weight
  decay is decoupled, not multiplied by the learning rate, and does not apply to vectors. Codebooks
  are updated by SGD with learning rate 1: their gradient is the difference between the old and the
  new moving average (see `model.quantizer`).
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


def codebook_is_finite(gradients: Params) -> Array:
  """Returns whether all gradients of the codebooks are finite, [] bool; True without codebooks."""
  return jnp.isfinite(
    sum(
      jnp.sum(value)
      for module, leaves in gradients.items()
      for name, value in leaves.items()
      if is_codebook(module, name)
    )
    + 0.0
  )


def weight_gradient_norm(gradients: Params) -> Array:
  """Returns the norm that `grad_clip` limits, [] f32: of all gradients except the codebooks'."""
  return optax.tree.norm(
    [
      value
      for module, leaves in gradients.items()
      for name, value in leaves.items()
      if not is_codebook(module, name)
    ]
  )
