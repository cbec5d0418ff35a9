"""Where the first number that is none comes from."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import transformer
from tvq_haiku.training import gradients as gradients_lib
from tvq_haiku.training import losses
from tvq_haiku.types import Array, Batch


class NumericalError(ArithmeticError):
  """Training met numbers that are not finite; the message says when and where."""


def first_non_finite(
  config: TransformerConfig,
  params: Any,
  rng: Array,
  batch: Batch,
  state: transformer.TransformerState,
  *,
  sequence_rng: Array | None = None,
) -> str | None:
  """Names the first tensor of a training step that has a value which is not finite.

  Looks at parameters and state, then at what each module of the model returns, in the order of
  computation and without compiling, then at the losses, and last at the gradients.

  Args:
    config: as in `gradients.loss_gradients`, like all that follow.
    params: of the model.
    rng: of dropout.
    batch: of the window.
    state: before the window.
    sequence_rng: of the sequence's own masks.

  Returns:
    Such as "output of transformer/layers/attention_1/q in layer 2: 3 of 4096 values"; None if all is
    finite.

  >>> from tvq_haiku.config import TrainConfig
  >>> from tvq_haiku.training import train_step
  >>> config, train_cfg = TransformerConfig.tiny(n_layer=1), TrainConfig()
  >>> params = train_step.init_train_state(config, train_cfg, jax.random.key(0)).params
  >>> params["transformer/embedding"]["embeddings"] *= jnp.inf
  >>> tokens = jnp.zeros((1, 4), jnp.int32)
  >>> first_non_finite(config, params, jax.random.key(0), {"inputs": tokens, "targets": tokens},
  ...                  transformer.initial_state(config, 1))
  'parameter transformer/embedding/embeddings: 8288 of 8288 values'
  """
  for module, leaves in params.items():
    for name, value in leaves.items():
      if found := _count(value):
        return f"parameter {module}/{name}: {found}"
  for path, value in jax.tree_util.tree_leaves_with_path(state):
    if found := _count(value):
      return f"state{jax.tree_util.keystr(path)}: {found}"
  first: list[str] = []
  calls: dict[str, int] = {}

  def look(call, args, kwargs, context):
    out = call(*args, **kwargs)
    name = context.module.module_name
    if context.method_name != "__call__":
      return out
    index = calls[name] = calls.get(name, 0) + 1
    if not first and (found := next(filter(None, map(_count, jax.tree.leaves(out))), None)):
      # The stack of layers calls the modules of one layer again and again, by names of their own.
      where = (
        name if name.startswith("transformer") else f"transformer/layers/{name} in layer {index}"
      )
      first.append(f"output of {where}: {found}")
    return out

  # Eagerly, and without what would trace it: the values must be there to be looked at.
  plain = config.replace(remat="none")
  with jax.disable_jit(), hk.intercept_methods(look):
    loss, aux = losses.training_loss(plain, params, rng, batch, state, sequence_rng=sequence_rng)
  if first:
    return first[0]
  for name, value in (("loss", loss), ("loss_lm", aux.loss_lm), ("loss_commit", aux.loss_commit)):
    if not np.isfinite(value):
      return f"{name}: {value}"
  _, _, gradients = jax.jit(gradients_lib.loss_gradients, static_argnums=0)(
    config, params, rng, batch, state, sequence_rng=sequence_rng
  )
  for module, leaves in gradients.items():
    for name, value in leaves.items():
      if found := _count(value):
        return f"gradient of {module}/{name}: {found}"
  return None


def _count(value: Any) -> str | None:
  if not jnp.issubdtype(jnp.result_type(value), jnp.floating) or isinstance(value, jax.core.Tracer):
    return None
  bad = np.size(value) - int(np.isfinite(np.asarray(value, np.float32)).sum())
  return f"{bad} of {np.size(value)} values" if bad else None
