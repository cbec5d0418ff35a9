"""Rows of tokens, how they are cut into blocks, and how blocks are taken one by one.

Letters: B batch, T tokens, H query heads, G key/value heads, n tokens, R blocks, L block length,
M memory length, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.types import Array

_MANY_SHIFTS = 32  # a slice each


class KeyValues(NamedTuple):
  """Keys and values in reading order; n tokens, or R blocks of them, from axis 2 on."""

  codes: Array  # [B, G, n] int32: S for an empty slot
  keys: Array  # [B, G, n, K]
  values: Array  # [B, G, n, V]
  docs: Array  # [B, 1, n] int32


def concatenate(*rows: Any) -> Any:
  """Rows (trees of arrays [B, ?, n, ...]) one behind the other."""
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *rows)


def slice_tokens(row: Any, start: int, stop: int) -> Any:
  """Tokens start, ..., stop-1."""
  return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, stop, axis=2), row)


def split_blocks(row: Any, n_block: int) -> Any:
  """[B, ?, R·L, ...] -> [B, ?, R, L, ...]."""
  return jax.tree.map(
    lambda x: x.reshape(*x.shape[:2], n_block, x.shape[2] // n_block, *x.shape[3:]), row
  )


def reverse(row: Any) -> Any:
  """Last token, or last block, first."""
  return jax.tree.map(lambda x: jnp.flip(x, axis=2), row)


def lay_out_queries(
  q: Array, bias: Array | None, scale: float, n_kv_head: int, block_len: int
) -> Array:
  """Lays out scale (q + bias) by block: [B, T, H, K] -> [B, G, R, A, K].

  The P = H/G heads that share keys stand behind each other, A = P·L rows; the last block is
  filled up with zeros.
  """
  B, T, H, K = q.shape
  q = q if bias is None else q + bias.astype(q.dtype)
  q = (q * scale).astype(q.dtype).reshape(B, T, n_kv_head, H // n_kv_head, K).swapaxes(1, 2)
  q = pad_tokens(q, -T % block_len, 0)
  q = split_blocks(q, q.shape[2] // block_len).swapaxes(3, 4)  # [B, G, R, P, L, K]
  return q.reshape(*q.shape[:3], -1, K)


def restore_layout(values: Array, block_len: int, length: int) -> Array:
  """Back again: [B, G, R, A, V] -> [B, T, H, V], without the filling."""
  B, G, R, A, V = values.shape
  values = values.reshape(B, G, R, A // block_len, block_len, V).transpose(0, 2, 4, 1, 3, 5)
  return values.reshape(B, R * block_len, -1, V)[:, :length]


def preceding_windows(row: Any, length: int, n_block: int, block_len: int) -> Any:
  """The M tokens from the start of each block of a row on: [B, ?, M+R·L, ...] -> [B, ?, R, M, ...].

  In a row that begins with the memory, they are those in front of the block's own tokens. Blocks
  of the row, shifted and put side by side: a gather would be slower, its gradient most of all,
  unless there are very many shifts.

  >>> preceding(jnp.arange(7)[None, None], 3, 2, 2).tolist()
  [[[[0, 1, 2], [2, 3, 4]]]]
  """

  def windows(x: Array) -> Array:
    if n_block == 1:
      return x[:, :, None, :length]
    if length > _MANY_SHIFTS * block_len:
      starts = block_len * jnp.arange(n_block)[:, None]
      return x[:, :, starts + jnp.arange(length)]
    pieces = []
    for start in range(0, length, block_len):
      piece = split_blocks(slice_tokens(x, start, start + n_block * block_len), n_block)
      pieces.append(piece[:, :, :, : length - start])
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=3)

  return jax.tree.map(windows, row)


def last_tokens(memory: Any, row: Any, lengths: Array | None) -> Any:
  """The last M tokens of the memory followed by the first `lengths` [B] (None: all) of the row."""
  M, T = (jax.tree.leaves(x)[0].shape[2] for x in (memory, row))
  if lengths is None and T >= M:
    return slice_tokens(row, T - M, T)
  both = concatenate(memory, row)
  if lengths is None:
    return slice_tokens(both, T, T + M)
  take = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, M, axis=1))
  return jax.tree.map(lambda x: take(x, lengths), both)


def pad_tokens(row: Any, n: int, filler: Any) -> Any:
  """Appends n tokens; `filler` has a constant for each field."""

  def append(x: Array, value: int) -> Array:
    widths = [(0, n) if axis == 2 else (0, 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)

  return jax.tree.map(append, row, filler)


def scan_blocks(
  attend: Callable[..., Any], carry: Any, group: Any, n_block: int, *, remat: bool
) -> tuple[Any, Array]:
  """Calls `attend` block by block; axis 2 of `group` holds all of them."""
  by_block = split_blocks(group, n_block)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*x.shape[:2], *x.shape[3:]), x.dtype), by_block
  )
  # One flat row a block: around axes of length 1, XLA copies all of a loop's operands and results
  # into layouts that differ in name only.
  xs = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0).reshape(n_block, -1), by_block)
  out = jax.eval_shape(attend, carry, like)[1]

  def step(carry: Any, flat: Any) -> tuple[Any, Array]:
    carry, values = attend(carry, jax.tree.map(lambda x, y: x.reshape(y.shape), flat, like))
    return carry, values.reshape(-1)

  if not remat:
    carry, values = jax.lax.scan(step, carry, xs)
  else:
    # Two levels: the backward pass keeps the caches of about 2 sqrt(R) blocks instead of all R.
    inner = _group_size(n_block)
    even = n_block - n_block % inner
    step = jax.checkpoint(step, prevent_cse=False)
    several = jax.checkpoint(lambda carry, xs: jax.lax.scan(step, carry, xs), prevent_cse=False)
    groups = jax.tree.map(lambda x: x[:even].reshape(even // inner, inner, -1), xs)
    carry, values = jax.lax.scan(several, carry, groups)
    if even < n_block:
      carry, rest = several(carry, jax.tree.map(lambda x: x[even:], xs))
      values = jnp.concatenate([values.reshape(even, -1), rest])
  values = jnp.moveaxis(values.reshape(n_block, *out.shape), 0, 2)
  return carry, values.reshape(*values.shape[:2], -1, *values.shape[4:])


def _group_size(n_block: int) -> int:
  """The divisor next below the square root, or the root where that is far below it."""
  root = math.isqrt(n_block)
  divisor = max(n for n in range(1, root + 1) if n_block % n == 0)
  return divisor if 2 * divisor >= root else root
