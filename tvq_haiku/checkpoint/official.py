"""Conversion of parameters to and from the names of the paper's code.

The paper's code has two layouts, named after its branches:

main         Each layer has its own subtree. Supports only head_type='shga' with attn_type='vq'.
optimized    All layers are stacked along a leading axis, which is followed by an axis of length 1.
             The kernels of keys, values and gates are separate. Norms have no gain or offset, and a
             tied output has no bias. Supports attn_type='vq' and attn_type='full'.

Models that read features (no_emb) cannot be converted.

This package stacks the layers along the first axis, and has one kernel for keys, values and gates.
In this package and in both layouts, kernels are [in, out], and heads are concatenated in order.
Conversions only slice, stack and reshape arrays, with one exception: `optimized` multiplies the
logits by e_scale before it adds the bias of an untied output, but this package multiplies the sum.
So that bias is multiplied by e_scale on the way to `optimized`, and divided on the way back.

Letters: X vocabulary, D model width, H query heads, G key/value heads, S codes per codebook, K key
width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import parameters
from tvq_haiku.types import Array, ArrayTree, Params

_LAYOUTS = ("main", "optimized")

# Official path -> (module, name) in this package; the module is relative to its parent module. The
# comments give the shapes for a single layer.
_Names = Mapping[str, tuple[str, str]]

_MAIN_MODEL: _Names = {
  "token_embedder/embs": ("embedding", "embeddings"),  # [X, D] token embeddings
  "token_embedder/bias_out": (
    "embedding",
    "output_bias",
  ),  # [X] of a tied output; unused without e_tie
  "out_proj/kernel": ("unembedding", "kernel"),  # [D, X] without e_tie
  "out_proj/bias": ("unembedding", "bias"),  # [X] without e_tie
  "out_ln/g": ("norm", "gain"),  # [D] with e_preln
  "out_ln/b": ("norm", "offset"),  # [D] with e_preln
  "position_embedder/scale": ("position", "scale"),  # [] with pe_abs
}
_MAIN_ATTENTION: _Names = {
  "input_ln/g": ("norm", "gain"),  # [D]
  "input_ln/b": ("norm", "offset"),  # [D]
  "q_proj/kernel": ("q", "kernel"),  # [D, H*K] queries
  "kvg_proj/kernel": ("kvg", "kernel"),  # [D, G*K + G*V + H*V] keys, values and gates
  "r_proj/kernel": ("r", "kernel"),  # [D, G*K] relative position keys
  "res_proj/kernel": ("out", "kernel"),  # [H*V, D] output projection
  "u": ("", "u"),  # [H*K] content bias of the queries
  "v": ("", "v"),  # [H*K] position bias of the queries
  "quantizer/c_sum": ("quantizer", "c_sum"),  # [G, S, K] moving sums of keys
  "quantizer/c_count": ("quantizer", "c_count"),  # [G, S] moving counts of keys
}

_OPTIMIZED_MODEL: _Names = {
  "token_embed/embedding": ("embedding", "embeddings"),  # [X, D] token embeddings
  "out_proj/kernel": ("unembedding", "kernel"),  # [D, X] without e_tie
  "out_proj/bias": ("unembedding", "bias"),  # [X] without e_tie; multiplied by e_scale
  "pos_embed/scale": ("position", "scale"),  # [] with pe_abs
}
_OPTIMIZED_LAYER: _Names = {
  "MultiLayerPerceptron_0/Dense_0/kernel": ("mlp/up", "kernel"),  # [D, hidden] mha and mqa
  "MultiLayerPerceptron_0/Dense_1/kernel": ("mlp/down", "kernel"),  # [hidden, D] mha and mqa
}
_OPTIMIZED_ATTENTION: _Names = {
  "qkvg_producer/q_proj/kernel": ("q", "kernel"),  # [D, H*K] queries
  "xl_bias_producer/xl_r_proj/kernel": ("r", "kernel"),  # [D, G*K] relative position keys
  "xl_bias_producer/xl_u": ("", "u"),  # [H*K] content bias of the queries
  "xl_bias_producer/xl_v": ("", "v"),  # [H*K] position bias of the queries
  "res_proj/kernel": ("out", "kernel"),  # [H*V, D] output projection
  "quantizer/c_sum": ("quantizer", "c_sum"),  # [G, S, K] moving sums of keys
  "quantizer/c_count": ("quantizer", "c_count"),  # [G, S] moving counts of keys
}
# Values of the parameters that `optimized` does not have, by their name in this package.
_CONSTANTS = {"gain": 1.0, "offset": 0.0, "output_bias": 0.0}


class _Source(NamedTuple):
  """The part of a parameter of this package that an official parameter corresponds to."""

  module: str
  name: str
  shape: tuple[int, ...]  # shape of the official parameter
  layer: int | None = None  # index on the first axis; None: all layers
  columns: tuple[int, int] | None = None  # [start, end) on the last axis; None: all columns


def params_from_official(tree: Mapping[str, ArrayTree], config: TransformerConfig) -> Params:
  """Converts parameters of the paper's code to parameters of this package.

  Args:
    tree: nested dicts, or a flat dict with keys such as 'a/b/c', in the layout `main` or
      `optimized`. The layout is detected. A single outermost key 'params' is ignored.
    config: the configuration of the model.

  Returns:
    Parameters for `make_transformer(config)`. Gains, offsets and biases that `optimized` does not
    have are set to ones and zeros.

  Raises:
    ValueError: parameters are missing, unknown or of a different shape; the message lists them.
  """
  official = dict(_flatten(tree))
  if official and all(path.startswith("params/") for path in official):
    official = {path.removeprefix("params/"): value for path, value in official.items()}
  layout = "optimized" if any(path.startswith("stack/") for path in official) else "main"
  sources = dict(_sources(config, layout))
  _check_official(official, sources)

  # (module, name) -> the layers or the ranges of columns of this parameter, in order.
  slices: dict[tuple[str, str], list[Array]] = {}
  for path, source in sources.items():
    value = jnp.asarray(official[path])
    if layout == "optimized":
      value = _from_optimized(value, source, config)
    slices.setdefault((source.module, source.name), []).append(value)

  def join(module: str, name: str, shape: tuple[int, ...]) -> Array:
    values = slices.get((module, name))
    if values is None:
      return jnp.full(shape, _CONSTANTS[name], jnp.float32)
    if len(values) == 1:
      return values[0].reshape(shape)
    return jnp.stack(values) if layout == "main" else jnp.concatenate(values, axis=-1)

  return {
    module: {name: join(module, name, x.shape) for name, x in names.items()}
    for module, names in parameters.params_shapes(config).items()
  }


def params_to_official(
  params: Params, config: TransformerConfig, *, layout: str = "main"
) -> dict[str, Array]:
  """Converts parameters of this package, or their gradients, to those of the paper's code.

  Args:
    params: parameters of `make_transformer(config)`, or a tree of the same structure: gradients,
      or `jax.ShapeDtypeStruct`s.
    config: the configuration of the model.
    layout: 'main' or 'optimized'. Parameters that 'optimized' does not have (gains, offsets and the
      bias of a tied output) are left out. The bias of an untied output is multiplied by
      e_scale, which is wrong for a gradient of that bias unless e_scale is 1.

  Returns:
    A flat dict with keys such as 'a/b/c'.

  Raises:
    ValueError: a parameter is missing or of a different shape, or the layout is unknown or cannot
      represent the model.

  >>> config = TransformerConfig.tiny()
  >>> shapes = parameters.params_shapes(config)
  >>> sorted(params_to_official(shapes, config))[0]
  'out_proj/bias'
  """
  if layout not in _LAYOUTS:
    raise ValueError(f"params_to_official: layout={layout!r} must be 'main' or 'optimized'.")
  convert = _to_optimized if layout == "optimized" else _to_main
  shapes = parameters.params_shapes(config)
  official = {}
  for path, source in _sources(config, layout):
    value = params.get(source.module, {}).get(source.name)
    expected = shapes[source.module][source.name].shape
    if value is None or tuple(value.shape) != expected:
      problem = "is missing" if value is None else f"has shape {tuple(value.shape)}"
      raise ValueError(
        f"params do not fit this config: {source.module}/{source.name} {problem}, expected shape "
        f"{expected}."
      )
    function = functools.partial(convert, source=source, config=config)
    is_shape = isinstance(value, jax.ShapeDtypeStruct)
    official[path] = jax.eval_shape(function, value) if is_shape else function(value)
  return official


def _to_main(value: Array, source: _Source, config: TransformerConfig) -> Array:
  """Converts a parameter of this package to an official one in the layout `main`."""
  return value if source.layer is None else value[source.layer]


def _to_optimized(value: Array, source: _Source, config: TransformerConfig) -> Array:
  """Converts a parameter of this package to an official one in the layout `optimized`."""
  if (source.module, source.name) == ("transformer/unembedding", "bias"):
    return value * config.e_scale
  if source.columns is not None:
    value = value[..., slice(*source.columns)]
  return value[:, None] if source.module.startswith("transformer/layers/") else value


def _from_optimized(value: Array, source: _Source, config: TransformerConfig) -> Array:
  """Converts an official parameter in the layout `optimized` to the part given by `source`."""
  if (source.module, source.name) == ("transformer/unembedding", "bias"):
    return value / config.e_scale
  return value[:, 0] if source.module.startswith("transformer/layers/") else value


def _check_official(official: Mapping[str, Array], sources: Mapping[str, _Source]) -> None:
  """Raises an error that names all missing, unknown and misshapen official parameters."""
  problems = [f"missing {path}" for path in sorted(sources.keys() - official.keys())]
  problems += [f"unknown {path}" for path in sorted(official.keys() - sources.keys())]
  for path in sorted(sources.keys() & official.keys()):
    expected, shape = sources[path].shape, tuple(np.shape(official[path]))
    if shape != expected:
      problems.append(f"{path} has shape {shape}, expected {expected}")
  if problems:
    raise ValueError("the official parameters do not fit this config: " + "; ".join(problems) + ".")


def _sources(config: TransformerConfig, layout: str) -> Iterator[tuple[str, _Source]]:
  """Yields (official path, source) of all official parameters of a layout."""
  if config.no_emb:
    raise ValueError(
      "no_emb=True: only parameters of models that read tokens can be converted. Use no_emb=False."
    )
  return (_main_sources if layout == "main" else _optimized_sources)(config)


def _main_sources(config: TransformerConfig) -> Iterator[tuple[str, _Source]]:
  if not config.gated or config.attn_type != "vq":
    hint = " Use the layout 'optimized'." if config.attn_type in ("vq", "full") else ""
    raise ValueError(
      "the layout 'main' supports head_type='shga' and attn_type='vq' only, not "
      f"{config.head_type!r} and {config.attn_type!r}.{hint}"
    )
  yield from _existing(config, _MAIN_MODEL, "transformer")
  for j in (1, 2):
    module = f"transformer/layers/attention_{j}"
    for path, source in _existing(config, _MAIN_ATTENTION, module):
      n_layer, *shape = source.shape
      for i in range(n_layer):
        yield (
          f"transformer_layers_{i}/scanned_attn{j}/{path}",
          source._replace(shape=tuple(shape), layer=i),
        )


def _optimized_sources(config: TransformerConfig) -> Iterator[tuple[str, _Source]]:
  if config.attn_type not in ("vq", "full"):
    raise ValueError(
      "the layout 'optimized' supports attn_type='vq' and attn_type='full' only, not "
      f"{config.attn_type!r}."
    )

  def stacked(source: _Source) -> _Source:
    n_layer, *shape = source.shape
    return source._replace(shape=(n_layer, 1, *shape))

  yield from _existing(config, _OPTIMIZED_MODEL, "transformer")
  for path, source in _existing(config, _OPTIMIZED_LAYER, "transformer/layers"):
    yield f"stack/{path}", stacked(source)
  attention = "VQAttention" if config.attn_type == "vq" else "FullAttention"
  for j in range(2 if config.gated else 1):
    module = f"transformer/layers/attention_{j + 1}"
    for path, source in (
      *_existing(config, _OPTIMIZED_ATTENTION, module),
      *_fused_projections(config, module),
    ):
      yield f"stack/{attention}_{j}/{path}", stacked(source)


def _fused_projections(config: TransformerConfig, module: str) -> Iterator[tuple[str, _Source]]:
  """Yields the kernels of keys, values and gates: ranges of columns of one kernel here."""
  widths = {"k": config.kv_heads * config.d_k, "v": config.kv_heads * config.d_v}
  if config.gated:
    widths["g"] = config.n_head * config.d_v
  start = 0
  for letter, width in widths.items():
    yield (
      f"qkvg_producer/{letter}_proj/kernel",
      _Source(
        module=f"{module}/{''.join(widths)}",
        name="kernel",
        shape=(config.n_layer, config.d_model, width),
        columns=(start, start + width),
      ),
    )
    start += width


def _existing(
  config: TransformerConfig, names: _Names, parent: str
) -> Iterator[tuple[str, _Source]]:
  """Yields (official path, source) of the parameters in a table that the configuration has."""
  shapes = parameters.params_shapes(config)
  for path, (child, name) in names.items():
    module = f"{parent}/{child}" if child else parent
    if name in shapes.get(module, {}):
      yield path, _Source(module, name, shapes[module][name].shape)


def _flatten(tree: Mapping[str, ArrayTree], prefix: str = "") -> Iterator[tuple[str, Array]]:
  """Yields (path, array) of all leaves of nested dicts; keys may be paths themselves."""
  for key, value in tree.items():
    path = prefix + re.sub("/+", "/", str(key)).strip("/")
    if isinstance(value, Mapping):
      yield from _flatten(value, path + "/")
    else:
      yield path, value
