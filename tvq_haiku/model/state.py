"""The state of the model between two calls: the stacked states of all its attentions.

Letters: B batch, N layers. The fields of one attention's state are in `attention.state`.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import attention_layer
from tvq_haiku.types import Array, ArrayTree


class TransformerState(NamedTuple):
  """The model's memory of the tokens that it has read. Its size does not depend on their number."""

  document: Array  # [B] int32: document of the last token; -1 before the first token
  position: Array  # [B] int32: tokens read of this document (with doc_mask=False: of all documents)
  attention_1: attention_layer.State  # every field [N, B, ...]
  attention_2: attention_layer.State | None  # every field [N, B, ...]; None if layers have an MLP


def initial_state(config: TransformerConfig, batch_size: int) -> TransformerState:
  """Returns the state before the first token.

  Args:
    config: configuration of the model.
    batch_size: B.

  Raises:
    ValueError: `batch_size` is less than 1.

  >>> config = TransformerConfig.tiny()
  >>> initial_state(config, 3).attention_1.cache_means.shape  # N, B, G, S, V
  (2, 3, 1, 16, 64)
  """
  if batch_size < 1:
    raise ValueError(f"initial_state: batch_size={batch_size} must be at least 1.")
  return _initial_state(config, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_state(config: TransformerConfig, batch_size: int) -> TransformerState:
  def all_layers(attention: TransformerConfig) -> attention_layer.State:
    state = attention_layer.initial_state(attention, batch_size)
    return jax.tree.map(lambda x: jnp.repeat(x[None], config.n_layer, axis=0), state)

  states = [all_layers(attention) for attention in config.attention_configs]
  return TransformerState(
    document=jnp.full((batch_size,), -1, jnp.int32),
    position=jnp.zeros((batch_size,), jnp.int32),
    attention_1=states[0],
    attention_2=states[1] if config.gated else None,
  )


def check_state(state: TransformerState, config: TransformerConfig, batch_size: int) -> None:
  """Checks that a state fits a configuration and a batch size.

  Args:
    state: the state that the user passed.
    config: configuration of the model.
    batch_size: B.

  Raises:
    ValueError: a field has a wrong shape or dtype; the message names the first such field.
  """
  expected = jax.eval_shape(lambda: initial_state(config, batch_size))
  fields, structure = jax.tree_util.tree_flatten_with_path(expected)
  if jax.tree.structure(state) != structure:
    raise ValueError(f"state must come from tvq_haiku.initial_state, got {type(state).__name__}.")
  for (path, field), value in zip(fields, jax.tree.leaves(state), strict=True):
    if (field.shape, field.dtype) != (jnp.shape(value), jnp.result_type(value)):
      name = jax.tree_util.keystr(path)
      raise ValueError(
        f"state{name} must be {field.dtype}{list(field.shape)} for this config and a batch of "
        f"{batch_size}, got {jnp.result_type(value)}{list(jnp.shape(value))}."
      )


def map_batch_axis(
  function: Callable[[Array, int], Array], state: TransformerState, *, first: int = 0
) -> TransformerState:
  """Applies a function to every field of a state, and passes it the batch axis of the field.

  Args:
    function: called as `function(field, batch_axis)`.
    state: a `TransformerState`, whose fields may have additional leading axes.
    first: number of additional leading axes.
  """

  def map_fields(fields: ArrayTree, axis: int) -> ArrayTree:
    return jax.tree.map(lambda x: function(x, axis), fields)

  return TransformerState(
    document=function(state.document, first),
    position=function(state.position, first),
    attention_1=map_fields(state.attention_1, first + 1),
    attention_2=map_fields(state.attention_2, first + 1),
  )
