"""Moves padding to the end of each row, and back; rounds lengths up.

Between `compact` and `restore`, the padding of each row follows its tokens. So the index of a token
in its row is also its index in the text, wherever the caller's padding was.

Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.types import Array


class CompactBatch(NamedTuple):
  """A batch in which the padding of each row follows its tokens."""

  inputs: Array  # tokens [B, T] int32, or features [B, T, D]; 0 for padding
  doc_ids: Array  # [B, T] int32
  loss_mask: Array  # [B, T] f32; 0 for padding
  is_token: Array  # [B, T] bool
  lengths: Array | None  # [B] int32: tokens before the padding. None: there is no padding
  order: Array | None  # [B, T] int32: original index of each token. None: no token has moved


def compact(
  inputs: Array, last_doc: Array, doc_ids: Array | None, loss_mask: Array | None
) -> CompactBatch:
  """Moves the padding (negative `doc_ids`) of each row behind its tokens, which keep their order.

  Args:
    inputs: tokens [B, T] int32, or features [B, T, D].
    last_doc: [B] int32: the document that all tokens continue if `doc_ids` is None; -1 before
      the first token.
    doc_ids: [B, T] int32, or None.
    loss_mask: [B, T], or None: all ones.

  Returns:
    The batch in its new order.

  >>> batch = compact(jnp.array([[0, 8, 9]]), jnp.array([-1]), jnp.array([[-1, 0, 0]]), None)
  >>> batch.inputs.tolist(), batch.lengths.tolist()
  ([[8, 9, 0]], [2])
  """
  chex.assert_rank((inputs, last_doc), ({2, 3}, 1))
  shape = inputs.shape[:2]
  weights = jnp.ones(shape, jnp.float32) if loss_mask is None else loss_mask.astype(jnp.float32)
  if doc_ids is None:
    docs = jnp.broadcast_to(jnp.maximum(last_doc, 0)[:, None], shape)
    return CompactBatch(inputs, docs, weights, jnp.ones(shape, bool), None, None)
  doc_ids = jnp.asarray(doc_ids, jnp.int32)
  is_token = doc_ids >= 0
  order = jnp.argsort(~is_token, axis=1, stable=True)
  weights = jnp.where(is_token, weights, 0.0)
  inputs, doc_ids, weights, is_token = (
    reorder(x, order) for x in (inputs, doc_ids, weights, is_token)
  )
  # Padding has no effect, unless it is NaN, or a token out of range, whose embedding would be NaN.
  inputs = jnp.where(is_token.reshape(*shape, *(1,) * (inputs.ndim - 2)), inputs, 0)
  lengths = jnp.sum(is_token, axis=1, dtype=jnp.int32)
  return CompactBatch(inputs, doc_ids, weights, is_token, lengths, order)


def reorder(x: Array, order: Array) -> Array:
  """Permutes the tokens of each row.

  Args:
    x: [B, T, ...].
    order: [B, T] int32: a permutation of 0, ..., T-1 for each row.

  Returns:
    [B, T, ...].
  """
  chex.assert_equal_shape_prefix((x, order), 2)
  return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def restore(x: Array, batch: CompactBatch) -> Array:
  """Returns `x` [B, T, D] in the order that the tokens had before `compact`."""
  chex.assert_equal_shape_prefix((x, batch.inputs), 2)
  if batch.order is None:
    return x
  return reorder(x, jnp.argsort(batch.order, axis=1))


def document_positions(
  batch: CompactBatch, last_doc: Array, n_before: Array, *, restart: bool
) -> tuple[Array, Array, Array]:
  """Computes the index of each token in its document.

  Args:
    batch: the compacted batch.
    last_doc: [B] int32: document of the last token before the batch; -1 before the first token.
    n_before: [B] int32: number of tokens of that document before the batch.
    restart: False: documents do not restart the index; it counts all tokens.

  Returns:
    index [B, T] int32; and `last_doc` and `n_before`, [B] int32 each, for the next batch.
  """
  B, T = batch.doc_ids.shape
  chex.assert_shape((last_doc, n_before), (B,))
  before = jnp.concatenate([last_doc[:, None], batch.doc_ids[:, :-1]], axis=1)
  starts = (batch.doc_ids != before) & (restart | (before < 0))
  here = jnp.arange(T, dtype=jnp.int32)
  # A document that continues from the state began `n_before` tokens before this row.
  start = jax.lax.cummax(jnp.where(starts, here, -n_before[:, None]), axis=1)
  index = here - start
  lengths = jnp.full((B,), T, jnp.int32) if batch.lengths is None else batch.lengths
  last = jnp.maximum(lengths - 1, 0)[:, None]
  has_tokens = lengths > 0
  last_of_row = jnp.take_along_axis(batch.doc_ids, last, axis=1)[:, 0]
  n_of_row = jnp.take_along_axis(index, last, axis=1)[:, 0] + 1
  return (
    index,
    jnp.where(has_tokens, last_of_row, last_doc),
    jnp.where(has_tokens, n_of_row, n_before),
  )


def round_up_to_power_of_two(n: int) -> int:
  """Returns the smallest power of two >= n.

  Arrays whose lengths are rounded up in this way need few compiled programs.

  >>> [round_up_to_power_of_two(n) for n in (1, 2, 3, 8, 9)]
  [1, 2, 4, 8, 16]
  """
  return 1 << max(n - 1, 0).bit_length()
