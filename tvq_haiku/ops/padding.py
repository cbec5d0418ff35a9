"""Moves padding to the end of each row and back."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.types import Array


class Rows(NamedTuple):
  """A batch whose padding stands behind its tokens, row by row."""

  tokens: Array  # [B, T] int32
  doc_ids: Array  # [B, T] int32
  loss_mask: Array  # [B, T] f32; zero for padding
  is_token: Array  # [B, T] bool
  lengths: Array | None  # [B] int32; None: no padding
  order: Array | None  # [B, T] int32: where each came from; None: unmoved


def compact(tokens: Array, document: Array, doc_ids: Array | None, loss_mask: Array | None) -> Rows:
  """Moves the padding (negative `doc_ids`) of every row behind its tokens, which keep their order.

  Then a token's place in the row is its place in the text, for padding on any side.

  Args:
    tokens: [B, T].
    document: [B] int32: the document that tokens continue when `doc_ids` is None.
    doc_ids: [B, T] or None.
    loss_mask: [B, T] or None.

  >>> rows = compact(jnp.array([[0, 8, 9]]), jnp.array([-1]), jnp.array([[-1, 0, 0]]), None)
  >>> rows.tokens.tolist(), rows.lengths.tolist()
  ([[8, 9, 0]], [2])
  """
  weights = (
    jnp.ones(tokens.shape, jnp.float32) if loss_mask is None else loss_mask.astype(jnp.float32)
  )
  if doc_ids is None:
    docs = jnp.broadcast_to(jnp.maximum(document, 0)[:, None], tokens.shape)
    return Rows(tokens, docs, weights, jnp.ones(tokens.shape, bool), None, None)
  doc_ids = jnp.asarray(doc_ids, jnp.int32)
  is_token = doc_ids >= 0
  order = jnp.argsort(~is_token, axis=1, stable=True)
  moved = [
    reorder(x, order) for x in (tokens, doc_ids, jnp.where(is_token, weights, 0.0), is_token)
  ]
  # A padding token's id is never looked at; 0 keeps an out-of-range one from becoming NaN.
  moved[0] = jnp.where(moved[3], moved[0], 0)
  return Rows(*moved, lengths=jnp.sum(is_token, axis=1, dtype=jnp.int32), order=order)


def reorder(x: Array, order: Array) -> Array:
  """[B, T, ...] with the tokens of row b in the order of `order[b]`, a permutation."""
  return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def restore(x: Array, rows: Rows) -> Array:
  """[B, T, D] in the caller's order of tokens."""
  if rows.order is None:
    return x
  return reorder(x, jnp.argsort(rows.order, axis=1))


def document_positions(
  rows: Rows, document: Array, position: Array, *, restart: bool
) -> tuple[Array, Array, Array]:
  """Index of each token in its document, and (document, tokens read of it) after the row.

  Args:
    rows: the compacted batch.
    document: [B] int32: the last document before the row.
    position: [B] int32: how many of its tokens were read.
    restart: False counts through documents.

  Returns:
    index [B, T], document [B], position [B], all int32.
  """
  B, T = rows.doc_ids.shape
  before = jnp.concatenate([document[:, None], rows.doc_ids[:, :-1]], axis=1)
  starts = (rows.doc_ids != before) & (restart | (before < 0))
  here = jnp.arange(T, dtype=jnp.int32)
  # The document that runs on from the state began `position` tokens before this row.
  start = jax.lax.cummax(jnp.where(starts, here, -position[:, None]), axis=1)
  index = here - start
  lengths = jnp.full((B,), T, jnp.int32) if rows.lengths is None else rows.lengths
  last = jnp.maximum(lengths - 1, 0)[:, None]
  read = lengths > 0
  document = jnp.where(read, jnp.take_along_axis(rows.doc_ids, last, axis=1)[:, 0], document)
  position = jnp.where(read, jnp.take_along_axis(index, last, axis=1)[:, 0] + 1, position)
  return index, document, position
