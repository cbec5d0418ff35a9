"""Models, batches and comparisons that several tests share."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import tvq_haiku as tvq

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def golden(name):
  """A golden file as a dict of arrays, and its model configuration."""
  with np.load(GOLDEN / f"{name}.npz") as arrays:
    arrays = dict(arrays)
  settings = json.loads(bytes(arrays["config"]))
  for name in ("param_dtype", "dtype"):  # theirs; ours is `precision`
    settings.pop(name)
  return arrays, tvq.TransformerConfig(**settings)


def subtree(arrays, prefix):
  """The entries under `prefix/`, without it."""
  return {k.removeprefix(prefix + "/"): v for k, v in arrays.items() if k.startswith(prefix + "/")}


@functools.cache
def random_params(config, seed=0):
  """Parameters in which nothing is 0 or 1 by initialisation, so that nothing hides."""
  rng = np.random.default_rng(seed)

  def draw(name, shape):
    fan_in = shape[-2] if name == "kernel" else 1
    values = rng.standard_normal(shape) * (0.3 if name in ("u", "v", "scale") else fan_in**-0.5)
    if name in ("gain", "c_count"):
      values = 1.0 + 0.3 * np.abs(values)
    return jnp.asarray(values, jnp.float32)

  return {module: {name: draw(name, leaf.shape) for name, leaf in leaves.items()}
          for module, leaves in tvq.params_shapes(config).items()}


def random_tokens(config, batch, length, seed=0):
  return np.random.default_rng(seed).integers(0, config.n_vocab, (batch, length)).astype(np.int32)


def assert_trees_close(got, want, atol=2e-5, rtol=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=rtol), got, want)
