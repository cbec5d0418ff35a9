"""Checks of arguments: chex assertions whose errors name the argument.

Internal functions call chex directly, because a failure there is a bug of the package. Public
functions check their arguments with the functions of this module: a user gets a ValueError (wrong
shape or value) or a TypeError (wrong dtype) that names the argument, what was expected and what was
passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.types import Array

# A letter for each axis; in a tuple, an axis may also be a pair (expression, size).
Axes = str | tuple[str | tuple[str, int], ...]


def check_arrays(
  caller: str, dims: chex.Dimensions, **arrays: tuple[Array | None, Axes, Any]
) -> None:
  """Checks the shapes and dtypes of arguments; the first use of a letter sets its size.

  Args:
    caller: name of the function, for the message.
    dims: letter -> size, as far as sizes are known; the letters of `arrays` are added to it.
    **arrays: name of the argument -> (array, axes, abstract dtype). Each axis is a letter, or a
      pair of an expression and its value, such as ("M+1", 5). An array that is None is not checked.

  Raises:
    ValueError: an array has a wrong shape.
    TypeError: an array has a wrong dtype, or an argument is not an array.

  >>> dims = chex.Dimensions()
  >>> check_arrays("f", dims, q=(jnp.ones((2, 3)), "TK", jnp.floating))
  >>> dims
  Dimensions(K=3, T=2)
  >>> check_arrays("f", dims, k=(jnp.ones((2, 4)), "TK", jnp.floating))
  Traceback (most recent call last):
  ValueError: f: k must have shape [T=2, K=3], got (2, 4).
  """
  for name, (x, axes, dtype) in arrays.items():
    if x is None:
      continue
    _check_is_array(f"{caller}: {name}", x)
    # A size that is not known yet is None, which chex matches with any size.
    sizes = [(a, getattr(dims, a, None)) if isinstance(a, str) else a for a in axes]
    try:
      chex.assert_shape(x, [n for _, n in sizes])
    except AssertionError:
      expected = ", ".join(axis if n is None else f"{axis}={n}" for axis, n in sizes)
      message = f"{caller}: {name} must have shape [{expected}], got {x.shape}."
      raise ValueError(message) from None
    try:
      chex.assert_type(x, dtype)
    except AssertionError:
      message = f"{caller}: {name} must be {dtype.__name__}, got {jnp.result_type(x)}."
      raise TypeError(message) from None
    for axis, n in zip(axes, x.shape, strict=True):
      if isinstance(axis, str):
        dims[axis] = (n,)


def _check_is_array(name: str, x: Array) -> None:
  if not (hasattr(x, "shape") and hasattr(x, "dtype")):
    raise TypeError(f"{name} must be an array, got {type(x).__name__}.")


def check_heads(caller: str, n_head: int, n_kv_head: int) -> None:
  """Checks that query heads can share key/value heads evenly.

  Args:
    caller: name of the function, for the message.
    n_head: H.
    n_kv_head: G.

  Raises:
    ValueError: G does not divide H.
  """
  if n_head % n_kv_head:
    raise ValueError(
      f"{caller}: {n_head} query heads cannot share {n_kv_head} key/value heads evenly."
    )


def check_tokens(tokens: Array, n_vocab: int) -> None:
  """Checks token ids [B, T].

  The values are checked only if they are in host memory, where this costs nothing. Under jit and on
  accelerators they are not checked, and the embedding turns ids that are out of range into NaN.

  Args:
    tokens: [B, T] integers in [0, X).
    n_vocab: X.

  Raises:
    ValueError: `tokens` has a wrong shape, or a value that is out of range.
    TypeError: `tokens` is not an array of integers.
  """
  _check_is_array("tokens", tokens)
  if len(tokens.shape) != 2 or 0 in tokens.shape:
    hint = ""
    if len(tokens.shape) == 3 and jnp.issubdtype(tokens.dtype, jnp.floating):
      hint = " Features [B, T, D] need no_emb=True."
    raise ValueError(f"tokens must be [B, T] with B, T >= 1, got shape {tokens.shape}.{hint}")
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise TypeError(f"tokens must be integers, got {tokens.dtype}.")
  if isinstance(tokens, jax.core.Tracer) or not _is_on_host(tokens):
    return
  # NumPy computes the bounds, because jnp would trace even constants inside of a transformation.
  # They are computed shard by shard, because a process can read only its own shards.
  shards = [tokens]
  if isinstance(tokens, jax.Array):
    shards = [shard.data for shard in tokens.addressable_shards]
  values = [np.asarray(shard) for shard in shards]
  lowest, highest = min(int(x.min()) for x in values), max(int(x.max()) for x in values)
  if lowest < 0 or highest >= n_vocab:
    raise ValueError(f"tokens must lie in [0, {n_vocab}), got {lowest}...{highest}.")


def check_features(name: str, features: Array, width: int) -> None:
  """Checks the inputs of a model that reads features instead of tokens.

  Args:
    name: name of the argument.
    features: [B, T, D] floating.
    width: D.

  Raises:
    ValueError: `features` has a wrong shape.
    TypeError: `features` is not an array of floating-point numbers.
  """
  _check_is_array(name, features)
  shape = features.shape
  if len(shape) != 3 or shape[2] != width or 0 in shape:
    raise ValueError(
      f"{name} must be features [B, T, D={width}] with B, T >= 1, because no_emb=True; got shape "
      f"{shape}."
    )
  if not jnp.issubdtype(features.dtype, jnp.floating):
    raise TypeError(f"{name} must be floating, because no_emb=True; got {features.dtype}.")


def _is_on_host(x: Array) -> bool:
  """Returns whether the values need not be copied from an accelerator."""
  return not isinstance(x, jax.Array) or all(d.platform == "cpu" for d in x.devices())


def check_mask(name: str, mask: Array | None, shape: tuple[int, int]) -> None:
  """Checks an array that has one value per token.

  Args:
    name: name of the argument, `doc_ids` or `loss_mask`.
    mask: [B, T], or None.
    shape: (B, T).

  Raises:
    ValueError: the mask has a wrong shape.
    TypeError: `doc_ids` does not have a signed integer dtype.
  """
  if mask is None:
    return
  _check_is_array(name, mask)
  if jnp.shape(mask) != shape:
    raise ValueError(
      f"{name} must have the shape [B, T] of the inputs, {shape}, got {jnp.shape(mask)}."
    )
  if name == "doc_ids" and not jnp.issubdtype(jnp.result_type(mask), jnp.signedinteger):
    raise TypeError(f"{name} must be signed integers, got {jnp.result_type(mask)}.")


def check_batch(
  batch: Mapping[str, Array], shape: tuple[int, int], n_vocab: int, *, n_feature: int | None = None
) -> None:
  """Checks a batch of inputs, targets and masks.

  Args:
    batch: "inputs" and "targets" and, optionally, "doc_ids" and "loss_mask".
    shape: (B, T).
    n_vocab: X.
    n_feature: D, if the inputs are features [B, T, D]. None: they are tokens [B, T].

  Raises:
    ValueError, TypeError: a key is missing or unknown, or its array has a wrong shape or dtype; the
      message names the key.
  """
  for key in ("inputs", "targets"):
    if key not in batch:
      raise ValueError(f"batch lacks {key!r}; it has {sorted(batch)}.")
  unknown = sorted(set(batch) - {"inputs", "targets", "doc_ids", "loss_mask"})
  if unknown:
    raise ValueError(f"batch has unknown keys {unknown}.")
  for key, value in batch.items():
    _check_is_array(f"batch[{key!r}]", value)
    if value.shape[:2] != shape or (key != "inputs" and value.shape != shape):
      raise ValueError(f"batch[{key!r}] must have shape {shape} [B, T], got {value.shape}.")
    if key == "inputs" and n_feature is not None:
      check_features("batch['inputs']", value, n_feature)
    elif key in ("inputs", "targets"):
      try:
        check_tokens(value, n_vocab)
      except (TypeError, ValueError) as error:
        raise type(error)(f"batch[{key!r}]: {error}") from None
