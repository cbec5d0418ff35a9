"""What stands between the caller's rows and the model: checks, padding, document positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.types import Array


def check_tokens(tokens: Array, n_vocab: int) -> None:
  """Raises for a wrong shape or type, and for values out of range where they can be seen."""
  if not hasattr(tokens, "shape"):
    raise TypeError(f"tokens must be an array, got {type(tokens).__name__}.")
  if tokens.ndim != 2 or 0 in tokens.shape:
    raise ValueError(f"tokens must be [B, T] with B, T >= 1, got shape {tokens.shape}.")
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise TypeError(f"tokens must be integers, got {tokens.dtype}.")
  if not isinstance(tokens, jax.core.Tracer) and _is_at_hand(tokens):
    # Not by jnp, which would trace a constant, too, inside of a transformation; and of several
    # hosts each has its own part.
    parts = (
      [s.data for s in tokens.addressable_shards] if isinstance(tokens, jax.Array) else [tokens]
    )
    values = [np.asarray(part) for part in parts]
    least, greatest = min(int(x.min()) for x in values), max(int(x.max()) for x in values)
    if least < 0 or greatest >= n_vocab:
      raise ValueError(f"tokens must lie in [0, {n_vocab}), got {least}...{greatest}.")


def _is_at_hand(x: Array) -> bool:
  """Whether to look at values is free: they need not be fetched from an accelerator."""
  return not isinstance(x, jax.Array) or all(d.platform == "cpu" for d in x.devices())


def check_arrays(
  caller: str, sizes: Mapping[str, int], arrays: Mapping[str, tuple[Array | None, str, Any]]
) -> dict[str, int]:
  """Holds arrays against shapes in letters; a letter's first use binds it.

  Args:
    caller: whom the message names.
    sizes: what is bound already.
    arrays: name -> (array or None, its axes' letters with spaces between, a kind of dtype).

  Returns:
    `sizes`, and all letters of the arrays.

  Raises:
    ValueError, TypeError: an array has another shape or kind; the message names it.

  >>> check_arrays("f", {}, {"q": (jnp.ones((2, 3)), "T K", jnp.floating)})
  {'T': 2, 'K': 3}
  >>> check_arrays("f", {"K": 4}, {"q": (jnp.ones((2, 3)), "T K", jnp.floating)})
  Traceback (most recent call last):
  ValueError: f: q must have shape [T, K=4], got (2, 3).
  """
  sizes = dict(sizes)
  for name, (x, axes, kind) in arrays.items():
    if x is None:
      continue
    letters, shape = axes.split(), jnp.shape(x)
    if len(shape) != len(letters) or any(
      sizes.get(letter, n) != n for letter, n in zip(letters, shape)
    ):
      known = ", ".join(f"{a}={sizes[a]}" if a in sizes else a for a in letters)
      raise ValueError(f"{caller}: {name} must have shape [{known}], got {shape}.")
    if not jnp.issubdtype(jnp.result_type(x), kind):
      raise TypeError(f"{caller}: {name} must be {kind.__name__}, got {jnp.result_type(x)}.")
    sizes |= zip(letters, shape)
  return sizes


def check_heads(caller: str, n_head: int, n_kv_head: int) -> None:
  """Raises unless query heads can share key/value heads evenly."""
  if n_head % n_kv_head:
    raise ValueError(
      f"{caller}: {n_head} query heads cannot share {n_kv_head} key/value heads evenly."
    )


def check_mask(name: str, mask: Array | None, tokens: Array) -> None:
  """Raises unless `mask` is None or has the shape of `tokens`."""
  if mask is None:
    return
  if jnp.shape(mask) != tokens.shape:
    raise ValueError(
      f"{name} must have the shape of tokens, {tokens.shape}, got {jnp.shape(mask)}."
    )
  if name == "doc_ids" and not jnp.issubdtype(jnp.result_type(mask), jnp.signedinteger):
    raise TypeError(f"{name} must be signed integers, got {jnp.result_type(mask)}.")


def check_state(
  state: Any, initial_state: Callable[..., Any], config: Any, batch_size: int
) -> None:
  """Raises, naming the first field, if `state` is not one of this config and batch."""
  expected = jax.eval_shape(lambda: initial_state(config, batch_size))
  want, tree = jax.tree_util.tree_flatten_with_path(expected)
  if jax.tree.structure(state) != tree:
    raise ValueError(f"state must come from tvq_haiku.initial_state, got {type(state).__name__}.")
  for (path, field), value in zip(want, jax.tree.leaves(state)):
    if (field.shape, field.dtype) != (jnp.shape(value), jnp.result_type(value)):
      name = jax.tree_util.keystr(path)
      raise ValueError(
        f"state{name} must be {field.dtype}{list(field.shape)} for this config and a batch of "
        f"{batch_size}, got {jnp.result_type(value)}{list(jnp.shape(value))}."
      )


def check_params(params: Any, shapes: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises, naming the first, unless `params` has the modules, names and `shapes` of a model."""
  got = {(m, n): jnp.shape(x) for m, leaves in params.items() for n, x in leaves.items()}
  want = {(m, n): x.shape for m, leaves in shapes.items() for n, x in leaves.items()}
  for key in sorted(want.keys() | got.keys()):
    if want.get(key) != got.get(key):
      raise ValueError(
        f"params are not of this config: {'/'.join(key)} has shape {got.get(key)}, "
        f"expected {want.get(key)}."
      )


def check_batch(batch: Mapping[str, Array], shape: tuple[int, int], n_vocab: int) -> None:
  """Raises, naming the key, unless `batch` holds tokens and masks of `shape`."""
  for key in ("inputs", "targets"):
    if key not in batch:
      raise ValueError(f"batch lacks {key!r}; it has {sorted(batch)}.")
  unknown = sorted(set(batch) - {"inputs", "targets", "doc_ids", "loss_mask"})
  if unknown:
    raise ValueError(f"batch has unknown keys {unknown}.")
  for key, value in batch.items():
    if value.shape != shape:
      raise ValueError(f"batch[{key!r}] must have shape {shape} [B, T], got {value.shape}.")
    if key in ("inputs", "targets"):
      try:
        check_tokens(value, n_vocab)
      except (TypeError, ValueError) as error:
        raise type(error)(f"batch[{key!r}]: {error}") from None
