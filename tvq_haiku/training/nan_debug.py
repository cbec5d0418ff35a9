"""Finds the first non-finite tensor of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import transformer
from tvq_haiku.training import gradients as gradients_lib
from tvq_haiku.training import losses
from tvq_haiku.types import Array, ArrayTree, Batch, Params


class NumericalError(ArithmeticError):
  """Training produced non-finite values; the message names the update and the first such tensor."""


def first_non_finite(
  params: Params,
  config: TransformerConfig,
  rng: Array,
  batch: Batch,
  state: transformer.TransformerState,
  *,
  sequence_rng: Array | None = None,
) -> str | None:
  """Finds the first tensor of a training step that has a non-finite value.

  Checks, in this order, the parameters, the state, the inputs, the output of each module in the
  order of computation, the losses and the gradients. The forward pass runs without compilation.

  Args:
    params: parameters of the model.
    config: its configuration.
    rng: key for dropout.
    batch: one update window, arrays [B, T].
    state: the model's state before the window.
    sequence_rng: key for the masks that all windows of a sequence share.

  Returns:
    A description of the tensor, such as "output of transformer/layers/attention_1/q in layer 2: 3
    of 4096 values"; None if all values are finite.

  >>> from tvq_haiku.config import TrainConfig
  >>> from tvq_haiku.training import train_step
  >>> config, train_cfg = TransformerConfig.tiny(n_layer=1), TrainConfig()
  >>> params = train_step.init_train_state(config, train_cfg, jax.random.key(0)).params
  >>> params["transformer/embedding"]["embeddings"] *= jnp.inf
  >>> tokens = jnp.zeros((1, 4), jnp.int32)
  >>> first_non_finite(params, config, jax.random.key(0), {"inputs": tokens, "targets": tokens},
  ...                  transformer.initial_state(config, 1))
  'parameter transformer/embedding/embeddings: 8288 of 8288 values'
  """
  if problem := _first_parameter(params):
    return f"parameter {problem}"
  for path, value in jax.tree_util.tree_leaves_with_path(state):
    if count := _count_non_finite(value):
      return f"state{jax.tree_util.keystr(path)}: {count}"
  if count := _count_non_finite(batch["inputs"]):  # features; tokens are integers
    return f"batch['inputs']: {count}"
  watch = _OutputWatch()
  # Without compilation and remat, modules return concrete values that can be inspected.
  eager_config = config.replace(remat="none")
  with jax.disable_jit(), hk.intercept_methods(watch):
    loss, aux = losses.training_loss(
      params, eager_config, rng, batch, state, sequence_rng=sequence_rng
    )
  if watch.first:
    return watch.first
  for name, value in (("loss", loss), ("loss_lm", aux.loss_lm), ("loss_commit", aux.loss_commit)):
    if not np.isfinite(value):
      return f"{name}: {value}"
  result = jax.jit(gradients_lib.loss_gradients, static_argnames="config")(
    params, config, rng, batch, state, sequence_rng=sequence_rng
  )
  problem = _first_parameter(result.gradients)
  return f"gradient of {problem}" if problem else None


class _OutputWatch:
  """A method interceptor that describes the first module output with a non-finite value."""

  def __init__(self):
    self.first: str | None = None
    self._n_calls: dict[str, int] = {}  # by module name

  def __call__(
    self,
    method: Callable[..., ArrayTree],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: hk.MethodContext,
  ) -> ArrayTree:
    """Calls the method, and inspects its output if it is the `__call__` of a module."""
    output = method(*args, **kwargs)
    if context.method_name != "__call__":
      return output
    name = context.module.module_name
    layer = self._n_calls[name] = self._n_calls.get(name, 0) + 1
    counts = map(_count_non_finite, jax.tree.leaves(output))
    if self.first is None and (count := next(filter(None, counts), None)):
      # The layer stack calls the modules of one layer N times, under names without its prefix.
      if not name.startswith("transformer"):
        name = f"transformer/layers/{name} in layer {layer}"
      self.first = f"output of {name}: {count}"
    return output


def _first_parameter(params: Params) -> str | None:
  """Describes the first parameter, or gradient, with a non-finite value; None if there is none."""
  for module, leaves in params.items():
    for name, value in leaves.items():
      if count := _count_non_finite(value):
        return f"{module}/{name}: {count}"
  return None


def _count_non_finite(value: Array) -> str | None:
  """Returns "n of m values" with n > 0 non-finite ones; None if there are none, or for a tracer."""
  if not jnp.issubdtype(jnp.result_type(value), jnp.floating) or isinstance(value, jax.core.Tracer):
    return None
  n = np.size(value) - int(np.isfinite(np.asarray(value, np.float32)).sum())
  return f"{n} of {np.size(value)} values" if n else None
