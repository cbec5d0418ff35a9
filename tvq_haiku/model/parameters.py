"""Parameters of the model: their names, shapes and dtypes, and a check that they fit a config."""

from __future__ import annotations

import functools

import haiku as hk
import jax
import jax.numpy as jnp

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model.transformer import make_transformer, zero_inputs
from tvq_haiku.types import Array, Params


def params_shapes(config: TransformerConfig) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Returns the shapes and dtypes of the parameters of `make_transformer(config)`.

  >>> shapes = params_shapes(TransformerConfig.tiny())
  >>> shapes["transformer/embedding"]["embeddings"].shape
  (259, 32)
  """
  return {module: dict(leaves) for module, leaves in _params_shapes(config).items()}


@functools.cache
def _params_shapes(config: TransformerConfig) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  def init(rng: Array) -> hk.Params:
    return make_transformer(config).init(rng, zero_inputs(config))

  return jax.eval_shape(init, jax.random.key(0))


def check_params(params: Params, config: TransformerConfig) -> None:
  """Raises unless `params` holds exactly the parameters of `make_transformer(config)`.

  Args:
    params: module path -> parameter name -> array or `jax.ShapeDtypeStruct`.
    config: the model's configuration.

  Raises:
    ValueError: a parameter is missing, unknown or has a different shape. The message names the
      first one in alphabetical order, its shape and the expected shape.

  >>> config = TransformerConfig.tiny()
  >>> check_params(params_shapes(config), config.replace(d_model=16))
  Traceback (most recent call last):
  ValueError: params do not fit this config: transformer/embedding/embeddings has shape ...
  """

  def shapes_by_path(tree: Params) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(m, n): jnp.shape(x) for m, leaves in tree.items() for n, x in leaves.items()}

  shapes, expected = shapes_by_path(params), shapes_by_path(_params_shapes(config))
  for key in sorted(shapes.keys() | expected.keys()):
    if shapes.get(key) == expected.get(key):
      continue
    if key not in shapes:
      problem = f"is missing, expected shape {expected[key]}"
    elif key not in expected:
      problem = f"has shape {shapes[key]}, but this config has no such parameter"
    else:
      problem = f"has shape {shapes[key]}, expected {expected[key]}"
    raise ValueError(f"params do not fit this config: {'/'.join(key)} {problem}.")
