"""Parameters in and out of the naming of the paper's code.

The paper's tree keeps one subtree a layer; ours stacks the N layers along the first axis. Values
are the same: projections are [in, out] in both, heads side by side with the head index slowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku import transformer
from tvq_haiku.config import TransformerConfig

_OUTSIDE = {  # theirs -> (our module, our name)
    "token_embedder/embs": ("embedding", "embeddings"),
    "token_embedder/bias_out": ("embedding", "output_bias"),
    "out_proj/kernel": ("unembedding", "kernel"),
    "out_proj/bias": ("unembedding", "bias"),
    "out_ln/g": ("norm", "gain"),
    "out_ln/b": ("norm", "offset"),
    "position_embedder/scale": ("position", "scale"),
}
_IN_ATTENTION = {
    "input_ln/g": ("norm", "gain"),
    "input_ln/b": ("norm", "offset"),
    "q_proj/kernel": ("q", "kernel"),
    "kvg_proj/kernel": ("kvg", "kernel"),
    "r_proj/kernel": ("r", "kernel"),
    "res_proj/kernel": ("out", "kernel"),
    "u": ("", "u"),
    "v": ("", "v"),
    "quantizer/c_sum": ("quantizer", "c_sum"),
    "quantizer/c_count": ("quantizer", "c_count"),
}


def params_from_official(tree: Mapping[str, Any], config: TransformerConfig) -> dict:
  """Our parameters with the values of a tree in the naming of the paper's `main` branch.

  Args:
    tree: nested dicts, or flat with 'a/b/c' keys; a single outer 'params' is looked through.
    config: the model that the tree is of.

  Returns:
    A parameter tree for `make_transformer(config)`.

  Raises:
    ValueError: leaves are missing, unknown, or of another shape; all of them are named.
  """
  theirs = dict(_flatten(tree))
  if theirs and all(key.startswith("params/") for key in theirs):
    theirs = {key.removeprefix("params/"): value for key, value in theirs.items()}
  places = dict(_places(config))
  problems = [f"missing {key}" for key in sorted(places.keys() - theirs.keys())]
  problems += [f"unknown {key}" for key in sorted(theirs.keys() - places.keys())]
  for key in sorted(places.keys() & theirs.keys()):
    want, got = places[key][3], tuple(np.shape(theirs[key]))
    if want != got:
      problems.append(f"{key} has shape {got}, expected {want}")
  if problems:
    raise ValueError("the official parameters do not fit this config: " + "; ".join(problems) + ".")

  layers: dict[tuple[str, str], dict[int | None, Any]] = {}
  for key, (module, name, layer, _) in places.items():
    layers.setdefault((module, name), {})[layer] = jnp.asarray(theirs[key])
  params: dict[str, dict[str, Any]] = {}
  for (module, name), values in layers.items():
    whole = values[None] if None in values else jnp.stack([values[i] for i in sorted(values)])
    params.setdefault(module, {})[name] = whole
  return params


def params_to_official(params: Mapping[str, Mapping[str, Any]], config: TransformerConfig, *,
                       layout: str = "main") -> dict[str, Any]:
  """The inverse: a flat dict with 'a/b/c' keys; maps gradients as well as parameters.

  Args:
    params: of `make_transformer(config)`, or a tree like it.
    config: the model.
    layout: 'main', the branch of the paper's code whose naming is wanted.

  >>> config = TransformerConfig.tiny()
  >>> ours = transformer.params_shapes(config)
  >>> sorted(params_to_official(ours, config))[0]
  'out_proj/bias'
  """
  if layout != "main":
    raise ValueError(f"params_to_official: layout={layout!r}: this version has 'main'.")
  theirs = {}
  for key, (module, name, layer, shape) in _places(config):
    try:
      value = params[module][name]
    except KeyError:
      raise ValueError(f"params_to_official: the parameters lack {module}/{name}.") from None
    stacked = shape if layer is None else (config.n_layer, *shape)
    if tuple(value.shape) != stacked:
      raise ValueError(f"params_to_official: {module}/{name} has shape {tuple(value.shape)}, "
                       f"expected {stacked}.")
    if layer is not None:
      take = lambda x, i=layer: x[i]
      value = jax.eval_shape(take, value) if isinstance(value, jax.ShapeDtypeStruct) else take(value)
    theirs[key] = value
  return theirs


def _places(config: TransformerConfig) -> Iterator[tuple[str, tuple[str, str, int | None, tuple]]]:
  """(their name, (our module, our name, layer or None, shape there)) of every leaf."""
  shapes = transformer.params_shapes(config)
  ours = {(module, name) for module, leaves in shapes.items() for name in leaves}
  for key, (module, name) in _OUTSIDE.items():
    module = f"transformer/{module}"
    if (module, name) in ours:
      yield key, (module, name, None, shapes[module][name].shape)
  for key, (part, name) in _IN_ATTENTION.items():
    for j in (1, 2):
      module = f"transformer/layers/attention_{j}" + (f"/{part}" if part else "")
      for i in range(config.n_layer):
        yield (f"transformer_layers_{i}/scanned_attn{j}/{key}",
               (module, name, i, shapes[module][name].shape[1:]))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    path = prefix + re.sub("/+", "/", str(key)).strip("/")
    if isinstance(value, Mapping):
      yield from _flatten(value, path + "/")
    else:
      yield path, value
