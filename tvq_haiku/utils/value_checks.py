"""Checks of numbers, texts and random keys: an error names the argument and what it takes.

Public functions check these arguments with the functions of this module, and arrays with those of
`checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.types import Array

Text = str | bytes  # a string, or bytes that need not be UTF-8


def check_not_traced(caller: str, *arguments: Any) -> None:
  """Checks that a function is not called inside of a transformation such as `jax.jit`.

  Args:
    caller: name of the function, for the message.
    *arguments: its arguments, trees of arrays.

  Raises:
    TypeError: an argument is traced, or the caller is inside of `jax.jit`.
  """
  values = [*jax.tree.leaves(arguments), jnp.zeros(())]  # inside of jit, the zero is traced, too
  if any(isinstance(value, jax.core.Tracer) for value in values):
    raise TypeError(
      f"{caller} is not for use inside jax.jit or another transformation, because it compiles its "
      "own steps: call it outside, or use tvq.decode_step or tvq.make_transformer(config).apply."
    )


def check_integer(
  caller: str, name: str, value: Any, *, minimum: int = 1, maximum: int | None = None
) -> int:
  """Returns an argument as an integer.

  Args:
    caller: name of the function, for the message.
    name: name of the argument.
    value: the value that was passed.
    minimum: the smallest allowed value.
    maximum: the largest allowed value; None: there is none.

  Raises:
    ValueError: the value is not an integer, or it is out of range.

  >>> check_integer("f", "n", np.int64(3))
  3
  >>> check_integer("f", "n", 2.5)
  Traceback (most recent call last):
  ValueError: f: n=2.5 must be an integer of at least 1.
  """
  is_integer = isinstance(value, int) and _is_number(value)  # isfinite fails for huge integers
  is_finite = is_integer or (_is_number(value) and math.isfinite(value))
  if is_finite and value == int(value) >= minimum and (maximum is None or value <= maximum):
    return int(value)
  limits = f"of at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
  raise ValueError(f"{caller}: {name}={value!r} must be an integer {limits}.")


def check_number(
  caller: str, name: str, value: Any, is_valid: Callable[[float], bool], rule: str
) -> float:
  """Returns an argument as a float.

  Args:
    caller: name of the function, for the message.
    name: name of the argument.
    value: the value that was passed.
    is_valid: returns whether a number is allowed.
    rule: what is allowed, such as "must be a number of at least 0".

  Raises:
    ValueError: the value is not a number, or not allowed.

  >>> check_number("f", "rate", None, lambda x: 0 <= x < 1, "must be a number in [0, 1)")
  Traceback (most recent call last):
  ValueError: f: rate=None must be a number in [0, 1).
  """
  try:
    number = float(value) if _is_number(value) else math.nan
  except OverflowError:  # an integer that is larger than any float
    number = math.inf if value > 0 else -math.inf
  if not _is_number(value) or not is_valid(number):
    raise ValueError(f"{caller}: {name}={value!r} {rule}.")
  return number


def _is_number(value: Any) -> bool:
  """Returns whether a value is a real number but no bool, or an array of one such number."""
  if isinstance(value, (int, float)):
    return not isinstance(value, bool)
  dtype = getattr(value, "dtype", None)
  is_real = dtype is not None and any(jnp.issubdtype(dtype, t) for t in (jnp.integer, jnp.floating))
  return is_real and np.ndim(value) == 0


def check_text(caller: str, name: str, value: Any) -> bytes:
  r"""Returns the bytes of a text (UTF-8 if it is a string).

  Args:
    caller: name of the function, for the message.
    name: name of the argument.
    value: the value that was passed.

  Raises:
    TypeError: the value is neither str nor bytes.
    ValueError: the value is a str that UTF-8 cannot encode.

  >>> check_text("f", "text", "Käse")
  b'K\xc3\xa4se'
  """
  if isinstance(value, str):
    try:
      return value.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"{caller}: {name}={value!r} has a surrogate at {error.start}, which is not a character: "
        "pass bytes (os.fsencode restores those of a file name or an argument)."
      ) from None
  if isinstance(value, (bytes, bytearray, memoryview)):
    return bytes(value)
  raise TypeError(f"{caller}: {name} must be a str or bytes, got {_describe(value)}.")


def check_texts(caller: str, name: str, value: Any) -> list[bytes]:
  """Returns the bytes of several texts.

  Args:
    caller: name of the function, for the message.
    name: name of the argument.
    value: the value that was passed: a list, an array or another iterable of texts.

  Raises:
    TypeError: an element is neither str nor bytes; the message has its index.
    ValueError: the value is one text, or an element is a str that UTF-8 cannot encode.

  >>> check_texts("f", "texts", np.array(["a", "b"]))
  [b'a', b'b']
  >>> check_texts("f", "texts", ["a", None])
  Traceback (most recent call last):
  TypeError: f: texts[1] must be a str or bytes, got None.
  """
  if isinstance(value, (str, bytes, bytearray, memoryview)):
    raise ValueError(
      f"{caller}: {name} must be a list of texts, got one {type(value).__name__}: pass [text]."
    )
  is_scalar = hasattr(value, "dtype") and np.ndim(value) == 0
  if is_scalar or not isinstance(value, Iterable):
    raise TypeError(f"{caller}: {name} must be a list of texts, got {_describe(value)}.")
  return [check_text(caller, f"{name}[{i}]", text) for i, text in enumerate(value)]


def check_key(caller: str, rng: Any) -> Array:
  """Returns one or several random keys as typed keys.

  Args:
    caller: name of the function, for the message.
    rng: the argument that was passed: a typed key, or the integers of an old-style key.

  Raises:
    TypeError: it is neither.

  >>> check_key("f", 0)
  Traceback (most recent call last):
  TypeError: f: rng must be a random key, such as jax.random.key(0), got 0.
  """
  dtype = getattr(rng, "dtype", None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return rng
  if dtype == jnp.uint32 and np.ndim(rng) > 0:
    try:
      return jax.random.wrap_key_data(jnp.asarray(rng))
    except TypeError:  # the last axis does not have the length of a key
      pass
  raise TypeError(
    f"{caller}: rng must be a random key, such as jax.random.key(0), got {_describe(rng)}."
  )


def _describe(value: Any) -> str:
  """Describes a value of a wrong type: its value if it is a short constant, else its type.

  >>> _describe(None), _describe([1, 2]), _describe("text"), _describe(np.zeros(3))
  ('None', 'a list', "'text'", 'an array of float64[3]')
  """
  if isinstance(value, np.number):
    value = value.item()
  if value is None or isinstance(value, (int, float)):
    return repr(value)
  if isinstance(value, (str, bytes)) and len(value) < 30:
    return repr(value)
  if hasattr(value, "dtype") and hasattr(value, "shape"):
    return f"an array of {value.dtype}{list(value.shape)}"
  name = type(value).__name__
  return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
