"""Linear functions whose transpose is given, too.

The backward pass of some operations is cheaper if it is written by hand. A `jax.custom_vjp` would
have such a backward pass, but no forward-mode derivative. So these operations state their
derivative as a linear function of tangents, for forward mode, together with its transpose, for
reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from tvq_haiku.types import Array, ArrayTree

R = TypeVar("R", bound=ArrayTree)
X = TypeVar("X", bound=ArrayTree)
Y = TypeVar("Y", bound=ArrayTree)


def linear_call(
  function: Callable[[R, X], Y], transpose: Callable[[R, Y], X], residuals: R, operands: X
) -> Y:
  """Returns `function(residuals, operands)`; its reverse-mode derivative is `transpose`.

  This is `jax.custom_derivatives.linear_call`, which can in addition be mapped by `jax.vmap`, and
  differentiated with respect to the residuals.

  Args:
    function: a function that is linear in its second argument. It may depend on arrays only through
      its arguments.
    transpose: (residuals, cotangents of the result) -> cotangents of the operands.
    residuals: tree of arrays.
    operands: tree of floating-point arrays.

  Returns:
    A tree of floating-point arrays.

  >>> def double(_, x):
  ...   return 2.0 * x
  >>> jax.grad(lambda x: linear_call(double, double, (), x))(1.0).item()
  2.0
  """
  leaves_r, tree_r = jax.tree.flatten(residuals)
  leaves_x, tree_x = jax.tree.flatten(operands)
  shapes, tree_y = jax.tree.flatten(jax.eval_shape(function, residuals, operands))

  def flat(function: Callable[..., ArrayTree], tree: Any) -> Callable[..., list[Array]]:
    def call(*leaves: Array) -> list[Array]:
      r, x = leaves[: len(leaves_r)], leaves[len(leaves_r) :]
      return jax.tree.leaves(function(tree_r.unflatten(r), tree.unflatten(x)))

    return call

  ys = _linear_call_p.bind(
    *leaves_r,
    *leaves_x,
    function=flat(function, tree_x),
    transpose=flat(transpose, tree_y),
    n_residual=len(leaves_r),
    out_avals=tuple(ShapedArray(s.shape, s.dtype) for s in shapes),
  )
  return tree_y.unflatten(ys)


# Operands: residuals, then linear operands. `function` and `transpose` take and return flat lists.
_linear_call_p = Primitive("linear_call_with_transpose")
_linear_call_p.multiple_results = True


def _evaluate(*args: Array, function: Callable[..., list[Array]], **_: Any) -> list[Array]:
  return function(*args)


def _jvp(
  primals: Sequence[Array], tangents: Sequence[Array | ad.Zero], **params: Any
) -> tuple[list[Array], list[Array]]:
  """Differentiates with respect to operands and, if they have tangents, residuals."""
  n = params["n_residual"]
  r, x = primals[:n], primals[n:]
  d_x = [ad.instantiate_zeros(t) for t in tangents[n:]]
  d_y = _linear_call_p.bind(*r, *d_x, **params)
  varying = [i for i, t in enumerate(tangents[:n]) if not isinstance(t, ad.Zero)]
  if varying:

    def of_varying(*values: Array) -> list[Array]:
      full = list(r)
      for i, value in zip(varying, values, strict=True):
        full[i] = value
      return params["function"](*full, *x)

    _, d_varying = jax.jvp(of_varying, [r[i] for i in varying], [tangents[i] for i in varying])
    d_y = [a + b for a, b in zip(d_y, d_varying, strict=True)]
  return _linear_call_p.bind(*primals, **params), d_y


def _transpose(cotangents: Sequence[Array | ad.Zero], *args: Any, **params: Any) -> list[Any]:
  n, x = params["n_residual"], args[params["n_residual"] :]
  x_avals = tuple(y.aval if ad.is_undefined_primal(y) else jax.typeof(y) for y in x)
  d_x = _linear_call_p.bind(
    *args[:n],
    *(ad.instantiate_zeros(ct) for ct in cotangents),
    function=params["transpose"],
    transpose=params["function"],
    n_residual=n,
    out_avals=x_avals,
  )
  d_x = [d if ad.is_undefined_primal(y) else None for d, y in zip(d_x, x, strict=True)]
  return [None] * n + d_x


def _batch(
  args: Sequence[Array], axes: Sequence[int | None], **params: Any
) -> tuple[list[Array], list[int]]:
  n = params["n_residual"]
  size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
  pairs = zip(args[n:], axes[n:], strict=True)
  x = [batching.bdim_at_front(y, axis, size) for y, axis in pairs]

  def batched(function: Callable[..., list[Array]], n_linear: int) -> Callable[..., list[Array]]:
    return jax.vmap(function, in_axes=(*axes[:n], *(0,) * n_linear))

  out_avals = tuple(ShapedArray((size, *a.shape), a.dtype) for a in params["out_avals"])
  y = _linear_call_p.bind(
    *args[:n],
    *x,
    function=batched(params["function"], len(x)),
    transpose=batched(params["transpose"], len(out_avals)),
    n_residual=n,
    out_avals=out_avals,
  )
  return y, [0] * len(y)


_linear_call_p.def_impl(_evaluate)
_linear_call_p.def_abstract_eval(lambda *_, out_avals, **params: list(out_avals))
ad.primitive_jvps[_linear_call_p] = _jvp
ad.primitive_transposes[_linear_call_p] = _transpose
batching.primitive_batchers[_linear_call_p] = _batch
mlir.register_lowering(_linear_call_p, mlir.lower_fun(_evaluate, multiple_results=True))
