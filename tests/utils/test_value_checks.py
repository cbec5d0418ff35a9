"""Checks of numbers, texts and random keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_haiku.utils import value_checks


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), np.array(3), jnp.array(3)])
def test_integers_of_any_type_are_converted(value):
  n = value_checks.check_integer("f", "n", value, maximum=3)
  assert n == 3 and type(n) is int


@pytest.mark.parametrize(
  "value", [0, 4, 2.5, float("nan"), float("inf"), None, "3", b"3", [3], np.array([3]), 3j, True]
)
def test_anything_else_is_no_integer(value):
  with pytest.raises(ValueError, match=r"f: n=.* must be an integer in \[1, 3\]"):
    value_checks.check_integer("f", "n", value, maximum=3)


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), jnp.float32(0.5), jnp.bfloat16(0.5)])
def test_numbers_of_any_type_are_converted(value):
  x = value_checks.check_number("f", "x", value, lambda x: x < 1, "must be less than 1")
  assert x == 0.5 and type(x) is float


@pytest.mark.parametrize(
  "value", [1, 10**400, float("nan"), None, "0.5", [0.5], np.array([0.5]), False]
)
def test_other_numbers_are_refused(value):
  with pytest.raises(ValueError, match=r"f: x=.* must be less than 1"):
    value_checks.check_number("f", "x", value, lambda x: x < 1, "must be less than 1")


@pytest.mark.parametrize(
  "value", ["é", "é".encode(), bytearray("é".encode()), memoryview("é".encode()), np.str_("é")]
)
def test_texts_of_any_type_are_converted_to_bytes(value):
  text = value_checks.check_text("f", "text", value)
  assert text == b"\xc3\xa9" and type(text) is bytes


def test_other_texts_are_refused():
  with pytest.raises(TypeError, match="f: text must be a str or bytes, got a dict"):
    value_checks.check_text("f", "text", {})
  with pytest.raises(ValueError, match=r"f: text='a.udcff' has a surrogate at 1, .*os.fsencode"):
    value_checks.check_text("f", "text", "a\udcff")


@pytest.mark.parametrize(
  "value",
  [
    ["a", b"b"],
    ("a", "b"),
    iter(["a", "b"]),
    np.array(["a", "b"]),
    np.array([b"a", b"b"]),
    np.array(["a", b"b"], object),
  ],
)
def test_lists_and_arrays_of_texts_are_converted(value):
  assert value_checks.check_texts("f", "texts", value) == [b"a", b"b"]


@pytest.mark.parametrize(
  "value, error, message",
  [
    ("ab", ValueError, "texts must be a list of texts, got one str: pass"),
    (b"ab", ValueError, "texts must be a list of texts, got one bytes: pass"),
    (None, TypeError, "texts must be a list of texts, got None"),
    (np.array("a"), TypeError, r"texts must be a list of texts, got an array of <U1\[\]"),
    (["a", None], TypeError, r"texts\[1\] must be a str or bytes, got None"),
    ([3.5], TypeError, r"texts\[0\] must be a str or bytes, got 3.5"),
    (np.array([["a"]]), TypeError, r"texts\[0\] must be a str or bytes, got an array of <U1\[1\]"),
    (["a", "\ud800"], ValueError, r"texts\[1\]=.* has a surrogate at 0"),
  ],
)
def test_other_lists_are_refused(value, error, message):
  with pytest.raises(error, match=f"^f: {message}"):
    value_checks.check_texts("f", "texts", value)


def test_typed_and_old_style_keys_are_accepted():
  key = jax.random.key(5)
  assert value_checks.check_key("f", key) is key
  assert (value_checks.check_key("f", jax.random.key_data(key)) == key).all()
  assert (value_checks.check_key("f", np.asarray(jax.random.key_data(key))) == key).all()


@pytest.mark.parametrize(
  "rng, name",
  [
    (0, "0"),
    (None, "None"),
    ("seed", "'seed'"),
    (np.uint32(3), "3"),
    (np.zeros(2, np.float32), r"an array of float32\[2\]"),
    (np.zeros(3, np.uint32), r"an array of uint32\[3\]"),
    (np.random.default_rng(0), "a Generator"),
  ],
)
def test_other_keys_are_refused(rng, name):
  with pytest.raises(TypeError, match=rf"f: rng must be a random key, such as .*, got {name}\."):
    value_checks.check_key("f", rng)


class TestNotTraced:
  def test_values_pass(self):
    value_checks.check_not_traced("f", None, 1, "text", {"a": [jnp.ones(2), np.ones(2)]})

  @pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad])
  def test_traced_arguments_are_refused(self, transform):
    def function(x):
      value_checks.check_not_traced("f", {"a": x})
      return jnp.sum(x)

    x = jnp.ones(()) if transform is jax.grad else jnp.ones(2)
    with pytest.raises(
      TypeError, match=r"f is not for use inside jax.jit or another .*tvq.decode_step"
    ):
      transform(function)(x)

  def test_jit_is_found_without_traced_arguments(self):
    with pytest.raises(TypeError, match=r"f is not for use inside jax.jit"):
      jax.jit(lambda x: value_checks.check_not_traced("f", 1))(jnp.ones(2))
