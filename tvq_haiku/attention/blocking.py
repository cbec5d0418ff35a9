"""Splits sequences into blocks, and loops over blocks.

A sequence is a tree of arrays [B, ?, n, ...] whose axis 2 is that of the tokens, or of the blocks.

Letters: B batch, T tokens, H query heads, G key/value heads, P = H/G, R blocks, L block length,
M memory length, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.ops import scan as scan_lib
from tvq_haiku.types import Array, ArrayTree, Tree

_MAX_SLICES = 32  # `preceding_windows` gathers instead of concatenating more slices


def concatenate(*sequences: Tree) -> Tree:
  """Concatenates sequences along axis 2."""
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *sequences)


def slice_tokens(sequence: Tree, start: int, stop: int) -> Tree:
  """Returns tokens (or blocks) start, ..., stop-1.

  Args:
    sequence: tree of arrays [B, ?, n, ...].
    start: index of the first token.
    stop: index after the last token.
  """
  return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, start, stop, axis=2), sequence)


def split_blocks(sequence: Tree, n_block: int) -> Tree:
  """Splits [B, ?, R·L, ...] into [B, ?, R, L, ...]."""
  return jax.tree.map(
    lambda x: x.reshape(*x.shape[:2], n_block, x.shape[2] // n_block, *x.shape[3:]), sequence
  )


def merge_blocks(blocks: Tree) -> Tree:
  """Merges [B, ?, R, L, ...] into [B, ?, R·L, ...]: the inverse of `split_blocks`."""
  return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1, *x.shape[4:]), blocks)


def reverse(sequence: Tree) -> Tree:
  """Reverses axis 2."""
  return jax.tree.map(lambda x: jnp.flip(x, axis=2), sequence)


def pad_tokens(sequence: Tree, n: int, filler: ArrayTree) -> Tree:
  """Appends n tokens to a sequence.

  Args:
    sequence: tree of arrays [B, ?, n_token, ...].
    n: number of tokens to append.
    filler: tree of constants, one for each array of the sequence.
  """

  def append(x: Array, value: int) -> Array:
    widths = [(0, n) if axis == 2 else (0, 0) for axis in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)

  return jax.tree.map(append, sequence, filler)


def lay_out_queries(
  q: Array, bias: Array | None, scale: float, n_kv_head: int, block_len: int
) -> Array:
  """Computes scale · (q + bias), laid out by head and block; zeros pad the last block.

  Args:
    q: [B, T, H, K].
    bias: [H, K], or None: zero.
    scale: factor of the scores.
    n_kv_head: G.
    block_len: L.

  Returns:
    [B, G, R, P, L, K] in the dtype of `q`.
  """
  B, T, H, K = q.shape
  if bias is not None:
    chex.assert_shape(bias, (H, K))
  q = q if bias is None else q + bias.astype(q.dtype)
  q = (q * scale).astype(q.dtype).reshape(B, T, n_kv_head, H // n_kv_head, K)
  q = pad_tokens(q.swapaxes(1, 2), -T % block_len, 0)  # [B, G, R·L, P, K]
  return split_blocks(q, q.shape[2] // block_len).swapaxes(3, 4)


def restore_layout(values: Array, length: int) -> Array:
  """Converts [B, G, R, P, L, V] to [B, T, H, V], without the padding of the last block."""
  chex.assert_rank(values, 6)
  B, G, R, P, L, V = values.shape
  return values.transpose(0, 2, 4, 1, 3, 5).reshape(B, R * L, G * P, V)[:, :length]


def preceding_windows(sequence: Tree, mem_len: int, n_block: int, block_len: int) -> Tree:
  """Returns the M tokens before each block: for block r, slots r·L, ..., r·L+M-1 of the sequence.

  The first L tokens of all windows are one slice of the sequence, split into blocks; the next L
  tokens are the same slice, shifted by L; and so on. A gather is slower than these slices, above
  all in the backward pass, unless there are very many of them.

  Args:
    sequence: [B, ?, M+R·L, ...]: M tokens of memory, then R blocks.
    mem_len: M.
    n_block: R.
    block_len: L.

  Returns:
    [B, ?, R, M, ...].

  >>> preceding_windows(jnp.arange(7)[None, None], 3, 2, 2).tolist()
  [[[[0, 1, 2], [2, 3, 4]]]]
  """

  def windows(x: Array) -> Array:
    if n_block == 1:
      return x[:, :, None, :mem_len]
    if mem_len > _MAX_SLICES * block_len:
      starts = block_len * jnp.arange(n_block)[:, None]
      return x[:, :, starts + jnp.arange(mem_len)]
    slices = []
    for start in range(0, mem_len, block_len):
      blocks = split_blocks(slice_tokens(x, start, start + n_block * block_len), n_block)
      slices.append(blocks[:, :, :, : mem_len - start])
    return slices[0] if len(slices) == 1 else jnp.concatenate(slices, axis=3)

  return jax.tree.map(windows, sequence)


def scan_blocks(
  step: Callable[[ArrayTree, ArrayTree], tuple[ArrayTree, Array]],
  carry: ArrayTree,
  blocks: ArrayTree,
  *,
  scan: scan_lib.Scan,
  remat: bool,
) -> tuple[ArrayTree, Array]:
  """Scans over blocks.

  Args:
    step: (carry, block) -> (carry, output), where block and output have R = 1.
    carry: any tree.
    blocks: tree of [B, ?, R, ...].
    scan: runs the loop: `jax.lax.scan` or `hk.scan`.
    remat: rematerialize carries and steps: see `ops.scan.checkpointed_scan`.

  Returns:
    The last carry, and the outputs [B, ?, R, ...].
  """
  chex.assert_equal_shape_prefix(jax.tree.leaves(blocks), 1)

  def body(carry: ArrayTree, block: ArrayTree) -> tuple[ArrayTree, Array]:
    carry, output = step(carry, jax.tree.map(lambda x: x[:, :, None], block))
    return carry, output[:, :, 0]

  blocks_first = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), blocks)
  carry, outputs = scan_lib.scan_flat_rows(body, carry, blocks_first, scan=scan, remat=remat)
  return carry, jnp.moveaxis(outputs, 0, 2)
