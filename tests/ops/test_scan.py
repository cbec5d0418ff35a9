"""Scans with a checkpointed or flat layout equal `jax.lax.scan`."""

import haiku as hk
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from tvq_haiku.ops import scan as scan_lib


def body(carry, x):
  carry = jnp.tanh(carry + x["a"]) * x["b"][0, 0]
  return carry, {"y": carry.reshape(2, 2) + 1.0}


def arguments(n):
  a, b, carry = jax.random.split(jax.random.key(0), 3)
  xs = {"a": jax.random.normal(a, (n, 4)), "b": jax.random.normal(b, (n, 1, 1))}
  return jax.random.normal(carry, (4,)), xs


SCANS = {
  "checkpointed": lambda f, carry, xs: scan_lib.checkpointed_scan(f, carry, xs),
  "flat rows": lambda f, carry, xs: scan_lib.scan_flat_rows(f, carry, xs),
  "both": lambda f, carry, xs: scan_lib.scan_flat_rows(f, carry, xs, remat=True),
}


@pytest.mark.parametrize("n", [1, 6, 7, 9])
@pytest.mark.parametrize("name", SCANS)
def test_values_and_gradients_equal_those_of_a_plain_scan(name, n):
  def loss(scan, carry, xs):
    carry, ys = scan(body, carry, xs)
    return jnp.sum(carry) + jnp.sum(ys["y"] ** 2), (carry, ys)

  got, want = (
    jax.value_and_grad(loss, argnums=(1, 2), has_aux=True)(scan, *arguments(n))
    for scan in (SCANS[name], jax.lax.scan)
  )
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)


@pytest.mark.parametrize("name", SCANS)
def test_gradients(name):
  check_grads(
    lambda carry, xs: SCANS[name](body, carry, xs),
    arguments(7),
    order=1,
    modes=["rev"],
    atol=1e-2,
    rtol=1e-2,
  )


def test_checkpointing_keeps_the_carries_of_about_two_square_roots_of_the_steps():
  n, width = 100, 64

  def kept(scan):
    def loss(carry):
      carry, _ = scan(lambda c, x: (jnp.sin(c) * x, ()), carry, jnp.ones(n))
      return jnp.sum(carry)

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones(width)))
    return f"f32[{n},{width}]" in jaxpr

  assert kept(jax.lax.scan) and not kept(scan_lib.checkpointed_scan)


@pytest.mark.parametrize("remat", [False, True])
def test_runs_in_haiku_scan_inside_of_a_transform(remat, monkeypatch):
  calls = []
  haiku_scan = hk.scan
  monkeypatch.setattr(hk, "scan", lambda *args: calls.append(1) or haiku_scan(*args))

  def apply(carry, xs):
    return scan_lib.scan_flat_rows(body, carry, xs, scan=hk.scan, remat=remat)

  transformed = hk.transform(apply)
  got = transformed.apply({}, None, *arguments(7))
  want = jax.lax.scan(body, *arguments(7))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)
  assert calls
