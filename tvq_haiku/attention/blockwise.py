"""The recurrence over blocks: each block attends its window and the cache of all tokens before it.

`attend_sequence` is the causal form and `attend_both_sides` the encoder's. Both take the blocks of
a sequence all at once, or one by one in a scan (reduction `scan`), with the same step.

Letters: B batch, G key/value heads, R blocks, P query heads for each key/value head, L block
length, M memory length, S codes, K key width, V value width.
"""

from __future__ import annotations

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
  """Options of the recurrence; values depend on neither `reduction`, `remat` nor `scan`."""

  reduction: str  # scan, serial, matmul or assoc_scan
  agg_cache: bool  # False: caches, and tokens farther than M, are masked
  grad_thru_cache: bool  # False: no gradient passes the start of a block
  remat: bool  # recompute scores in the backward pass
  scan: Scan  # runs loops over blocks: jax.lax.scan or hk.scan

  @property
  def prefix_reduction(self) -> str:
    """The reduction that merges the caches of several blocks."""
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
    cache: of all tokens before those; one summary.
    shared: codebook and relative keys.
    options: how blocks are computed.

  Returns:
    The values [B, G, R, P, L, V], and the cache after the sequence: of all tokens but the last M.
  """
  B, _, R, _, L, _ = queries.content.shape
  n_token = R * L
  chex.assert_shape((tokens.doc_ids, n_read), [(B, 1, n_token), (B,)])
  # In (memory, tokens), the memory after the sequence is the M slots from `n_read` on. Slots
  # before it move to the cache; those after it are padding, and would spoil the counts.
  moves_to_cache = jnp.arange(n_token) < n_read[:, None, None]  # [B, 1, R·L]
  blocks = (queries, *blocking.split_blocks((tokens, moves_to_cache), R))
  if options.reduction == "scan":

    def step(carry: tuple[KeyValues, Cache], block):
      values, *carry = _attend_blocks(*block, *carry, shared=shared, options=options)
      return tuple(carry), values

    (_, cache), values = blocking.scan_blocks(
      step, (memory, cache), blocks, scan=options.scan, remat=options.remat
    )
    return values, cache
  attend = functools.partial(_attend_blocks, shared=shared, options=_inside_remat(options))
  attend = jax.checkpoint(attend) if options.remat else attend
  values, _, cache = attend(*blocks, memory, cache)
  return values, cache


def _inside_remat(options: BlockOptions) -> BlockOptions:
  """Returns options for use inside of `jax.checkpoint`, where Haiku's scan would leak tracers."""
  return options._replace(scan=jax.lax.scan) if options.remat else options


def _attend_blocks(
  queries: Queries,
  tokens: KeyValues,
  moves_to_cache: Array,
  memory: KeyValues,
  cache: Cache,
  *,
  shared: SharedKeys,
  options: BlockOptions,
) -> tuple[Array, KeyValues, Cache]:
  """Attends R blocks at once; R is 1 in a scan.

  Args:
    queries: of R blocks.
    tokens: of R blocks.
    moves_to_cache: [B, 1, R, L] bool: whether slot j of (memory, tokens) moves to the cache.
    memory: the M tokens before the blocks.
    cache: of all tokens before those.
    shared: codebook and relative keys.
    options: how blocks are computed.

  Returns:
    The values [B, G, R, P, L, V], and memory and cache after the blocks.
  """
  R, L = tokens.doc_ids.shape[2:]
  M, S = memory.doc_ids.shape[2], shared.codebook.shape[1]
  chex.assert_shape(moves_to_cache, (None, 1, R, L))
  sequence = blocking.concatenate(memory, blocking.merge_blocks(tokens))  # M + R·L tokens
  # While the window moves over block r, the L slots from r·L on leave it.
  evicted = blocking.split_blocks(blocking.slice_tokens(sequence, 0, R * L), R)
  codes = jnp.where(moves_to_cache, evicted.codes, EMPTY)
  summaries = compressive_cache.summarize(codes, evicted.values, evicted.doc_ids, S)
  caches = compressive_cache.prefixes(
    cache, summaries, options.prefix_reduction, scan=options.scan
  )  # R + 1: before each block, and after the last
  before = blocking.preceding_windows(sequence, M, R, L)
  past = blocking.slice_tokens(caches, 0, R)
  memory = blocking.slice_tokens(sequence, R * L, R * L + M)
  cache = blocking.slice_tokens(caches, R, R + 1)
  if not options.grad_thru_cache:
    before, past, memory, cache = jax.lax.stop_gradient((before, past, memory, cache))
  values = block_scores.attend_blocks(
    queries,
    tokens.doc_ids,
    (before, tokens),
    (past,),
    shared,
    is_causal=True,
    agg_cache=options.agg_cache,
  )
  return values, memory, cache


def attend_both_sides(
  queries: Queries, tokens: KeyValues, shared: SharedKeys, options: BlockOptions, *, mem_len: int
) -> Array:
  """Attends R blocks of a sequence that see the tokens before and after them.

  Args:
    queries: of R blocks.
    tokens: [B, ?, R·L, ...]: the tokens of the blocks.
    shared: codebook and relative keys.
    options: how blocks are computed.
    mem_len: M: the window reaches M tokens before and after a block.

  Returns:
    The values [B, G, R, P, L, V].
  """
  R, S = queries.content.shape[2], shared.codebook.shape[1]
  context = functools.partial(
    _context_before, n_block=R, n_code=S, mem_len=mem_len, options=options
  )
  before, past = context(tokens)
  # What follows a block is what precedes it in the reversed sequence.
  after, future = context(blocking.reverse(tokens))
  after, future = blocking.reverse((after, future))  # blocks in reading order again
  after = jax.tree.map(lambda x: jnp.flip(x, axis=3), after)  # and the tokens of each window
  blocks = (queries, before, blocking.split_blocks(tokens, R), after, past, future)

  def attend(queries, before, tokens, after, past, future) -> Array:
    return block_scores.attend_blocks(
      queries,
      tokens.doc_ids,
      (before, tokens, after),
      (past, future),
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


def _context_before(
  tokens: KeyValues, *, n_block: int, n_code: int, mem_len: int, options: BlockOptions
) -> tuple[KeyValues, Cache]:
  """Returns what precedes each block of a text that starts with the tokens.

  Args:
    tokens: [B, ?, R·L, ...].
    n_block: R.
    n_code: S.
    mem_len: M.
    options: how blocks are computed.

  Returns:
    The M tokens before each block, and R caches of all tokens before those.
  """
  memory = _empty_memory(tokens, mem_len)
  sequence = blocking.concatenate(memory, tokens)
  n_token = tokens.doc_ids.shape[2]
  evicted = blocking.split_blocks(blocking.slice_tokens(sequence, 0, n_token), n_block)
  summaries = compressive_cache.summarize(evicted.codes, evicted.values, evicted.doc_ids, n_code)
  empty_cache = jax.tree.map(lambda x: jnp.zeros_like(x[:, :, :1]), summaries)
  empty_cache = empty_cache._replace(
    doc_id=jnp.full_like(empty_cache.doc_id, compressive_cache.NO_DOCUMENT)
  )
  caches = compressive_cache.prefixes(
    empty_cache, summaries, options.prefix_reduction, scan=options.scan
  )
  before = blocking.preceding_windows(sequence, mem_len, n_block, n_token // n_block)
  past = blocking.slice_tokens(caches, 0, n_block)
  if not options.grad_thru_cache:
    return jax.lax.stop_gradient((before, past))
  return before, past


def _empty_memory(tokens: KeyValues, mem_len: int) -> KeyValues:
  """Returns M empty slots, with the shapes and dtypes of the tokens."""

  def empty(x: Array, filler: int) -> Array:
    return jnp.full((*x.shape[:2], mem_len, *x.shape[3:]), filler, x.dtype)

  fillers = KeyValues(codes=EMPTY, keys=0, values=0, doc_ids=compressive_cache.NO_DOCUMENT)
  return jax.tree.map(empty, tokens, fillers)
