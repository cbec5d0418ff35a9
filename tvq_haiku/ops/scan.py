"""Scans that keep little for the backward pass, and whose operands XLA does not copy.

The scans take and return what `jax.lax.scan` does. Their argument `scan` runs the loop: it is
`jax.lax.scan`, or `hk.scan` inside a function that `hk.transform` transforms.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from tvq_haiku.types import ArrayTree

Body = Callable[[Any, Any], tuple[Any, Any]]  # (carry, x) -> (carry, y)
Scan = Callable[[Body, Any, Any], tuple[Any, Any]]  # `jax.lax.scan`, or `hk.scan`


def checkpointed_scan(
  body: Body, carry: ArrayTree, xs: ArrayTree, *, scan: Scan = jax.lax.scan
) -> tuple[ArrayTree, ArrayTree]:
  """Scans n steps, keeping about 2 sqrt(n) carries for the backward pass instead of n.

  Steps are rematerialized on two levels. The forward pass keeps the carry before each group of
  steps. The backward pass recomputes the carries of one group at a time, and then each step from
  its carry. So every step is computed three times. This is the square-root schedule of Chen et al.
  2016, "Training deep nets with sublinear memory cost" (arXiv 1604.06174).

  Args:
    body: (carry, x) -> (carry, y); without side effects.
    carry: any tree.
    xs: tree of [n, ...].
    scan: runs the outer loop. The inner loop is inside of `jax.checkpoint`, where `hk.scan` must
      not be used.

  Returns:
    The carry after n steps, and a tree of [n, ...].
  """
  n = jax.tree.leaves(xs)[0].shape[0]
  inner = group_size(n)
  even = n - n % inner
  step = jax.checkpoint(body, prevent_cse=False)
  group = jax.checkpoint(lambda carry, xs: jax.lax.scan(step, carry, xs), prevent_cse=False)
  groups = jax.tree.map(lambda x: x[:even].reshape(even // inner, inner, *x.shape[1:]), xs)
  carry, ys = scan(group, carry, groups)
  ys = jax.tree.map(lambda y: y.reshape(even, *y.shape[2:]), ys)
  if even < n:
    carry, rest = group(carry, jax.tree.map(lambda x: x[even:], xs))
    ys = jax.tree.map(lambda y, z: jnp.concatenate([y, z]), ys, rest)
  return carry, ys


def group_size(n: int) -> int:
  """Returns the number of steps in a group.

  It is the greatest divisor of n up to the root floor(sqrt(n)); or the root itself, with a last
  group that is smaller, if that divisor is less than half of it.

  >>> group_size(12), group_size(13)
  (3, 3)
  """
  root = math.isqrt(n)
  divisor = max(m for m in range(1, root + 1) if n % m == 0)
  return divisor if 2 * divisor >= root else root


def scan_flat_rows(
  body: Body,
  carry: ArrayTree,
  xs: ArrayTree,
  *,
  scan: Scan = jax.lax.scan,
  remat: bool = False,
) -> tuple[ArrayTree, ArrayTree]:
  """Scans with each leaf of xs and ys stored as one flat row for each step.

  If arrays have axes of length 1, XLA copies all operands and results of a loop to layouts that are
  equivalent. A flat row has only one layout.

  Args:
    body: (carry, x) -> (carry, y); without side effects.
    carry: any tree.
    xs: tree of [n, ...].
    scan: runs the loop.
    remat: use `checkpointed_scan`.

  Returns:
    The carry after n steps, and a tree of [n, ...].
  """
  n = jax.tree.leaves(xs)[0].shape[0]
  x_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
  y_shapes = jax.eval_shape(body, carry, x_shapes)[1]

  def flat_body(carry: ArrayTree, x: ArrayTree) -> tuple[ArrayTree, ArrayTree]:
    carry, y = body(carry, jax.tree.map(lambda x, like: x.reshape(like.shape), x, x_shapes))
    return carry, jax.tree.map(jnp.ravel, y)

  rows = jax.tree.map(lambda x: x.reshape(n, -1), xs)
  if remat:
    carry, ys = checkpointed_scan(flat_body, carry, rows, scan=scan)
  else:
    carry, ys = scan(flat_body, carry, rows)
  return carry, jax.tree.map(lambda y, like: y.reshape(n, *like.shape), ys, y_shapes)
