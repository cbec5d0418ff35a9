"""The recurrence over blocks: each block attends its window, and a cache of all older tokens.

`attend_sequence` is causal; `attend_both_sides` is for encoders. Both compute all blocks at once,
or one by one in a scan (reduction `scan`), by the same function.

Letters: B batch, G key/value heads, R blocks, P query heads for each key/value head, L block
length, M memory length, S codes, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.attention import block_scores, blocking, compressive_cache
from tvq_haiku.attention.block_scores import Queries, SharedKeys
from tvq_haiku.attention.compressive_cache import EMPTY, Cache
from tvq_haiku.attention.key_values import KeyValues
from tvq_haiku.ops.scan import Scan
from tvq_haiku.types import Array


class BlockOptions(NamedTuple):
  """Options of the recurrence; values do not depend on `reduction`, `remat` or `scan`."""

  reduction: str  # scan, serial, matmul or assoc_scan
  agg_cache: bool  # False: caches, and tokens farther than M, are masked
  grad_thru_cache: bool  # False: a block gives no gradient to tokens outside of it
  remat: bool  # recompute scores (and, if causal, caches) in the backward pass
  scan: Scan  # runs loops over blocks: jax.lax.scan or hk.scan

  @property
  def prefix_reduction(self) -> str:
    """The reduction that `compressive_cache.prefixes` uses."""
    return "serial" if self.reduction == "scan" else self.reduction


def attend_sequence(
  queries: Queries,
  tokens: KeyValues,
  n_read: Array,
  memory: KeyValues,
  cache: Cache,
  shared: SharedKeys,
  options: BlockOptions,
) -> tuple[Array, Cache]:
  """Attends R blocks of a sequence that follows a memory and a cache.

  Args:
    queries: of R blocks.
    tokens: [B, ?, R·L, ...]: the tokens of the blocks.
    n_read: [B] int32: number of tokens of each row that are not padding.
    memory: the M tokens before the sequence.
    cache: one summary of all tokens before those.
    shared: codebook and relative keys.
    options: how blocks are computed.

  Returns:
    The values [B, G, R, P, L, V], and the cache after the sequence: of all tokens but the last M.
  """
  B, _, R, _, L, _ = queries.content.shape
  chex.assert_shape((tokens.doc_ids, n_read), [(B, 1, R * L), (B,)])
  # In (memory, tokens), the memory after the sequence is the M slots from slot `n_read` on. The
  # slots before them move to the cache. The slots after them are padding and must not be counted.
  moves_to_cache = jnp.arange(R * L) < n_read[:, None, None]  # [B, 1, R·L]
  blocks = (queries, *blocking.split_blocks((tokens, moves_to_cache), R))
  if options.reduction == "scan":

    def step(carry: tuple[KeyValues, Cache], block) -> tuple[tuple[KeyValues, Cache], Array]:
      values, memory, cache = _attend_and_update(*block, *carry, shared, options)
      return (memory, cache), values

    (_, cache), values = blocking.scan_blocks(
      step, (memory, cache), blocks, scan=options.scan, remat=options.remat
    )
    return values, cache
  if options.remat:  # Haiku's scan would leak tracers out of `jax.checkpoint`
    options = options._replace(scan=jax.lax.scan)
  attend = functools.partial(_attend_and_update, shared=shared, options=options)
  values, _, cache = (jax.checkpoint(attend) if options.remat else attend)(*blocks, memory, cache)
  return values, cache


def _attend_and_update(
  queries: Queries,
  tokens: KeyValues,
  moves_to_cache: Array,
  memory: KeyValues,
  cache: Cache,
  shared: SharedKeys,
  options: BlockOptions,
) -> tuple[Array, KeyValues, Cache]:
  """Attends R blocks at once (one block in a scan), and updates memory and cache.

  Args:
    queries: of R blocks.
    tokens: of R blocks.
    moves_to_cache: see `_contexts`.
    memory: the M tokens before the blocks.
    cache: one summary of all tokens before those.
    shared: codebook and relative keys.
    options: how blocks are computed.

  Returns:
    The values [B, G, R, P, L, V], and memory and cache after the blocks.
  """
  n_code = shared.codebook.shape[1]
  (window_before, cache_before), (memory, cache) = _contexts(
    tokens, moves_to_cache, memory, cache, n_code, options
  )
  values = block_scores.attend_blocks(
    queries,
    tokens.doc_ids,
    (window_before, tokens),
    (cache_before,),
    shared,
    is_causal=True,
    agg_cache=options.agg_cache,
  )
  return values, memory, cache


def attend_both_sides(
  queries: Queries,
  tokens: KeyValues,
  memory: KeyValues,
  cache: Cache,
  shared: SharedKeys,
  options: BlockOptions,
) -> Array:
  """Attends R blocks of a sequence that see the tokens before and after them.

  Args:
    queries: of R blocks.
    tokens: [B, ?, R·L, ...]: the tokens of the blocks.
    memory: M empty slots, for what lies before and after the sequence.
    cache: one empty summary, for the same.
    shared: codebook and relative keys.
    options: how blocks are computed.

  Returns:
    The values [B, G, R, P, L, V].
  """
  B, _, R, _, L, _ = queries.content.shape
  chex.assert_shape(tokens.doc_ids, (B, 1, R * L))
  n_code = shared.codebook.shape[1]

  def contexts_before(tokens: KeyValues) -> tuple[KeyValues, Cache]:
    blocks, all_move = blocking.split_blocks(tokens, R), jnp.ones((B, 1, R, L), bool)
    return _contexts(blocks, all_move, memory, cache, n_code, options)[0]

  window_before, cache_before = contexts_before(tokens)
  # What follows a block is what precedes it in the reversed sequence.
  window_after, cache_after = blocking.reverse(contexts_before(blocking.reverse(tokens)))
  # That put the blocks back into their order; the tokens of each window are still reversed.
  window_after = jax.tree.map(lambda x: jnp.flip(x, axis=3), window_after)
  window = (window_before, blocking.split_blocks(tokens, R), window_after)
  blocks = (queries, window, (cache_before, cache_after))

  def attend(queries: Queries, window: Sequence[KeyValues], caches: Sequence[Cache]) -> Array:
    return block_scores.attend_blocks(
      queries,
      window[1].doc_ids,
      window,
      caches,
      shared,
      is_causal=False,
      agg_cache=options.agg_cache,
    )

  if options.reduction == "scan":
    _, values = blocking.scan_blocks(
      lambda carry, block: (carry, attend(*block)),
      None,
      blocks,
      scan=options.scan,
      remat=options.remat,
    )
    return values
  return (jax.checkpoint(attend) if options.remat else attend)(*blocks)


def _contexts(
  tokens: KeyValues,
  moves_to_cache: Array,
  memory: KeyValues,
  cache: Cache,
  n_code: int,
  options: BlockOptions,
) -> tuple[tuple[KeyValues, Cache], tuple[KeyValues, Cache]]:
  """Returns the tokens and caches before each of R blocks, and those after the last block.

  Args:
    tokens: of R blocks.
    moves_to_cache: [B, 1, R, L] bool: whether slot r·L + l of (memory, tokens) moves to the cache.
    memory: the M tokens before the blocks.
    cache: one summary of all tokens before those.
    n_code: S.
    options: how blocks are computed.

  Returns:
    The M tokens [B, ?, R, M, ...] before each block, and R caches of all tokens before those; and
    memory and cache after the last block.
  """
  R, L = tokens.doc_ids.shape[2:]
  M = memory.doc_ids.shape[2]
  chex.assert_shape(moves_to_cache, (None, 1, R, L))
  sequence = blocking.concatenate(memory, blocking.merge_blocks(tokens))  # M + R·L tokens
  # When the window moves from block r to block r+1, slots r·L, ..., r·L+L-1 leave it.
  evicted = blocking.split_blocks(blocking.slice_tokens(sequence, 0, R * L), R)
  codes = jnp.where(moves_to_cache, evicted.codes, EMPTY)
  summaries = compressive_cache.summarize(codes, evicted.values, evicted.doc_ids, n_code)
  caches = compressive_cache.prefixes(
    cache, summaries, options.prefix_reduction, scan=options.scan
  )  # R + 1: before each block, and after the last
  before = blocking.preceding_windows(sequence, M, R, L), blocking.slice_tokens(caches, 0, R)
  after = (
    blocking.slice_tokens(sequence, R * L, R * L + M),
    blocking.slice_tokens(caches, R, R + 1),
  )
  if not options.grad_thru_cache:
    before, after = jax.lax.stop_gradient((before, after))
  return before, after
