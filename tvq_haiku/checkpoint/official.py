"""Parameters in and out of the naming of the paper's code, of its branches `main` and `optimized`.

`main` keeps one subtree a layer, `optimized` has leading axes [N, 1]; ours stacks the N layers
along the first axis. Values are the same: projections are [in, out] everywhere, heads side by
side with the head index slowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import transformer

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


_OUTSIDE_OPTIMIZED = {
  "token_embed/embedding": ("embedding", "embeddings"),
  "out_proj/kernel": ("unembedding", "kernel"),
  "out_proj/bias": ("unembedding", "bias"),
  "pos_embed/scale": ("position", "scale"),
}
_IN_LAYER_OPTIMIZED = {
  "MultiLayerPerceptron_0/Dense_0/kernel": ("mlp/up", "kernel"),
  "MultiLayerPerceptron_0/Dense_1/kernel": ("mlp/down", "kernel"),
}
_IN_ATTENTION_OPTIMIZED = {
  "qkvg_producer/q_proj/kernel": ("q", "kernel"),
  "xl_bias_producer/xl_r_proj/kernel": ("r", "kernel"),
  "xl_bias_producer/xl_u": ("", "u"),
  "xl_bias_producer/xl_v": ("", "v"),
  "res_proj/kernel": ("out", "kernel"),
  "quantizer/c_sum": ("quantizer", "c_sum"),
  "quantizer/c_count": ("quantizer", "c_count"),
}
# What `optimized` does without: norms have no gain, a tied output has no bias.
_FILLERS = {"gain": 1.0, "offset": 0.0, "output_bias": 0.0}


class _Place(NamedTuple):
  """Where a leaf of theirs is in ours."""

  module: str
  name: str
  layer: int | None  # its index on the first axis; None: the whole leaf
  columns: tuple[int, int] | None  # of the last axis; None: all
  shape: tuple[int, ...]  # theirs


def params_from_official(tree: Mapping[str, Any], config: TransformerConfig) -> dict:
  """Our parameters with the values of a tree in the naming of the paper's code.

  Args:
    tree: of the branch `main` or `optimized`; nested dicts, or flat with 'a/b/c' keys; a single
      outer 'params' is looked through.
    config: the model that the tree is of.

  Returns:
    A parameter tree for `make_transformer(config)`.

  Raises:
    ValueError: leaves are missing, unknown, or of another shape; all of them are named.
  """
  theirs = dict(_flatten(tree))
  if theirs and all(key.startswith("params/") for key in theirs):
    theirs = {key.removeprefix("params/"): value for key, value in theirs.items()}
  layout = "optimized" if any(key.startswith("stack/") for key in theirs) else "main"
  shapes = transformer.params_shapes(config)
  places = dict(_places(config, layout))
  problems = [f"missing {key}" for key in sorted(places.keys() - theirs.keys())]
  problems += [f"unknown {key}" for key in sorted(theirs.keys() - places.keys())]
  for key in sorted(places.keys() & theirs.keys()):
    want, got = places[key].shape, tuple(np.shape(theirs[key]))
    if want != got:
      problems.append(f"{key} has shape {got}, expected {want}")
  if problems:
    raise ValueError("the official parameters do not fit this config: " + "; ".join(problems) + ".")

  pieces: dict[tuple[str, str], list[Any]] = {}
  for key, place in places.items():
    value = jnp.asarray(theirs[key])
    if layout == "optimized":
      value = _from_optimized(value, place, config)
    pieces.setdefault((place.module, place.name), []).append(value)

  def leaf(module: str, name: str) -> Any:
    shape = shapes[module][name].shape
    if (module, name) not in pieces:
      return jnp.full(shape, _FILLERS[name], jnp.float32)
    parts = pieces[module, name]
    if len(parts) == 1:
      return parts[0].reshape(shape)
    return jnp.stack(parts) if layout == "main" else jnp.concatenate(parts, axis=-1)

  return {module: {name: leaf(module, name) for name in names} for module, names in shapes.items()}


def params_to_official(
  params: Mapping[str, Mapping[str, Any]], config: TransformerConfig, *, layout: str = "main"
) -> dict[str, Any]:
  """The inverse: a flat dict with 'a/b/c' keys; maps gradients as well as parameters.

  Args:
    params: of `make_transformer(config)`, or a tree like it.
    config: the model.
    layout: `main` or `optimized`, the branch of the paper's code whose naming is wanted. The
      latter has no place for gains, offsets and the tied output's bias: they are left out. It
      adds the untied output's bias after e_scale: gradients agree only where that is 1.

  >>> config = TransformerConfig.tiny()
  >>> ours = transformer.params_shapes(config)
  >>> sorted(params_to_official(ours, config))[0]
  'out_proj/bias'
  """
  if layout not in ("main", "optimized"):
    raise ValueError(f"params_to_official: layout={layout!r} must be 'main' or 'optimized'.")
  shapes = transformer.params_shapes(config)
  theirs = {}
  for key, place in _places(config, layout):
    try:
      value = params[place.module][place.name]
    except KeyError:
      raise ValueError(
        f"params_to_official: the parameters lack {place.module}/{place.name}."
      ) from None
    expected = shapes[place.module][place.name].shape
    if tuple(value.shape) != expected:
      raise ValueError(
        f"params_to_official: {place.module}/{place.name} has shape "
        f"{tuple(value.shape)}, expected {expected}."
      )

    def take(x: Any, place: _Place = place) -> Any:
      if layout == "optimized":
        return _to_optimized(x, place, config)
      return x if place.layer is None else x[place.layer]

    is_shape = isinstance(value, jax.ShapeDtypeStruct)
    theirs[key] = jax.eval_shape(take, value) if is_shape else take(value)
  return theirs


def _from_optimized(value: Any, place: _Place, config: TransformerConfig) -> Any:
  if place.module == "transformer/unembedding" and place.name == "bias":
    return value / config.e_scale  # theirs is added after the scale
  return value[:, 0] if place.module.startswith("transformer/layers/") else value


def _to_optimized(value: Any, place: _Place, config: TransformerConfig) -> Any:
  if place.module == "transformer/unembedding" and place.name == "bias":
    return value * config.e_scale
  if place.columns is not None:
    value = value[..., slice(*place.columns)]
  return value[:, None] if place.module.startswith("transformer/layers/") else value


def _places(config: TransformerConfig, layout: str) -> Iterator[tuple[str, _Place]]:
  """(their name, place in ours) of every leaf of theirs."""
  shapes = transformer.params_shapes(config)

  def found(table: Mapping[str, tuple[str, str]], prefix: str):
    for key, (part, name) in table.items():
      module = f"{prefix}/{part}" if part else prefix
      if name in shapes.get(module, {}):
        yield key, module, name, shapes[module][name].shape

  if layout == "main":
    if not config.gated or config.attn_type != "vq":
      raise ValueError(
        "interop: the branch 'main' has head_type='shga' and attn_type='vq' only, "
        f"not {config.head_type!r} and {config.attn_type!r}."
      )
    for key, module, name, shape in found(_OUTSIDE, "transformer"):
      yield key, _Place(module, name, None, None, shape)
    for j in (1, 2):
      for key, module, name, shape in found(_IN_ATTENTION, f"transformer/layers/attention_{j}"):
        for i in range(config.n_layer):
          yield (
            f"transformer_layers_{i}/scanned_attn{j}/{key}",
            _Place(module, name, i, None, shape[1:]),
          )
    return
  for key, module, name, shape in found(_OUTSIDE_OPTIMIZED, "transformer"):
    yield key, _Place(module, name, None, None, shape)
  for key, module, name, shape in found(_IN_LAYER_OPTIMIZED, "transformer/layers"):
    yield f"stack/{key}", _Place(module, name, None, None, (shape[0], 1, *shape[1:]))
  kind = "VQAttention" if config.attn_type == "vq" else "FullAttention"
  for j in range(2 if config.gated else 1):
    prefix, ours = f"stack/{kind}_{j}", f"transformer/layers/attention_{j + 1}"
    for key, module, name, shape in found(_IN_ATTENTION_OPTIMIZED, ours):
      yield f"{prefix}/{key}", _Place(module, name, None, None, (shape[0], 1, *shape[1:]))
    start = 0
    widths = dict(k=config.kv_heads * config.d_k, v=config.kv_heads * config.d_v)
    if config.gated:
      widths["g"] = config.n_head * config.d_v
    for letter, width in widths.items():
      module = f"{ours}/kv{'g' if config.gated else ''}"
      yield (
        f"{prefix}/qkvg_producer/{letter}_proj/kernel",
        _Place(
          module, "kernel", None, (start, start + width), (config.n_layer, 1, config.d_model, width)
        ),
      )
      start += width


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    path = prefix + re.sub("/+", "/", str(key)).strip("/")
    if isinstance(value, Mapping):
      yield from _flatten(value, path + "/")
    else:
      yield path, value
