"""Linear functions with an explicit transpose.

The backward pass of some operations is cheaper if it is written by hand. A `jax.custom_vjp` would
have such a backward pass, but no forward-mode derivative. So these operations state their
derivative as a linear function of tangents, for forward mode, together with its transpose, for
reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from tvq_haiku.types import Array, ArrayTree

R = TypeVar("R", bound=ArrayTree)
X = TypeVar("X", bound=ArrayTree)
Y = TypeVar("Y", bound=ArrayTree)


def linear_call(
  function: Callable[[R, X], Y], transpose: Callable[[R, Y], X], residuals: R, operands: X
) -> Y:
  """Returns `function(residuals, operands)`; its reverse-mode derivative is `transpose`.

  Unlike `jax.custom_derivatives.linear_call`, this function can be mapped by `jax.vmap`, and
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
  leaves_x = jax.tree.leaves(operands)
  jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(residuals, operands)
  tree_y = jax.tree.structure(shapes)
  n = len(leaves_r)

  def flat_transpose(*leaves: Array) -> list[Array]:
    return jax.tree.leaves(transpose(tree_r.unflatten(leaves[:n]), tree_y.unflatten(leaves[n:])))

  ys = _linear_call_p.bind(
    *leaves_r, *leaves_x, function=jaxpr, transpose=flat_transpose, n_residual=n
  )
  return tree_y.unflatten(ys)


# Its operands are the residuals, and then the linear operands. Parameters:
#   function    ClosedJaxpr
#   transpose   a function of the residuals and the cotangents, which returns a list
#   n_residual  number of residuals
_linear_call_p = Primitive("linear_call_with_transpose")
_linear_call_p.multiple_results = True


def _evaluate(*args: Array, function: ClosedJaxpr, **_: Any) -> list[Array]:
  return jaxpr_as_fun(function)(*args)


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
      return jaxpr_as_fun(params["function"])(*full, *x)

    _, d_varying = jax.jvp(of_varying, [r[i] for i in varying], [tangents[i] for i in varying])
    d_y = [a + b for a, b in zip(d_y, d_varying, strict=True)]
  return _linear_call_p.bind(*primals, **params), d_y


def _transpose(
  cotangents: Sequence[Array | ad.Zero],
  *args: Any,
  function: ClosedJaxpr,
  transpose: Callable[..., list[Array]],
  n_residual: int,
) -> list[Any]:
  r, x = args[:n_residual], args[n_residual:]
  d_y = [ad.instantiate_zeros(ct) for ct in cotangents]
  d_x = _linear_call_p.bind(
    *r,
    *d_y,
    function=jax.make_jaxpr(transpose)(*r, *d_y),
    transpose=jaxpr_as_fun(function),
    n_residual=n_residual,
  )
  # An operand that is not an unknown is a constant zero.
  d_x = [d if ad.is_undefined_primal(y) else None for d, y in zip(d_x, x, strict=True)]
  return [None] * n_residual + d_x


def _batch(
  args: Sequence[Array],
  axes: Sequence[int | None],
  *,
  function: ClosedJaxpr,
  transpose: Callable[..., list[Array]],
  n_residual: int,
) -> tuple[list[Array], list[int]]:
  n = n_residual
  size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
  r, pairs = args[:n], zip(args[n:], axes[n:], strict=True)
  x = [batching.bdim_at_front(y, axis, size) for y, axis in pairs]

  def batched(function: Callable[..., list[Array]], n_linear: int) -> Callable[..., list[Array]]:
    return jax.vmap(function, in_axes=(*axes[:n], *(0,) * n_linear))

  y = _linear_call_p.bind(
    *r,
    *x,
    function=jax.make_jaxpr(batched(jaxpr_as_fun(function), len(x)))(*r, *x),
    transpose=batched(transpose, len(function.out_avals)),
    n_residual=n,
  )
  return y, [0] * len(y)


_linear_call_p.def_impl(_evaluate)
_linear_call_p.def_abstract_eval(lambda *_, function, **params: list(function.out_avals))
ad.primitive_jvps[_linear_call_p] = _jvp
ad.primitive_transposes[_linear_call_p] = _transpose
batching.primitive_batchers[_linear_call_p] = _batch
mlir.register_lowering(_linear_call_p, mlir.lower_fun(_evaluate, multiple_results=True))
