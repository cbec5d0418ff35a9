"""The small parts with parameters: projections, norm, embeddings; and dropout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import itertools

import haiku as hk
import jax
import jax.numpy as jnp
import jmp

from tvq_haiku.ops import affine, matmul, positions
from tvq_haiku.parallel import sharding
from tvq_haiku.types import Array

_NORM_EPS = 1e-6


def _kernel(fan_in: int, width: int) -> Array:
  init = hk.initializers.RandomNormal(fan_in**-0.5)
  return hk.get_parameter("kernel", (fan_in, width), jnp.float32, init=init)


class Projection(hk.Module):
  """x W with W ~ N(0, 1/fan_in), in the dtypes of the policy.

  Several widths share one kernel, side by side, but are computed apart: cutting up W is cheaper
  than cutting up x W, whose gradient would have to be put together again.

  On a mesh, its axis `rows` cuts the inputs, or `columns` the outputs of each width.
  """

  def __init__(
    self,
    *widths: int,
    rows: sharding.AxisNames = None,
    columns: Sequence[sharding.AxisNames] = (),
    name: str = "projection",
  ):
    super().__init__(name=name)
    self._widths = widths
    self._cuts = [(rows, column) for column in columns or (None,) * len(widths)]

  def __call__(self, x: Array) -> Array | tuple[Array, ...]:
    """[..., D] -> [..., width], or a tuple of them for several widths."""
    kernel = _kernel(x.shape[-1], sum(self._widths))
    ends = list(itertools.accumulate(self._widths[:-1]))
    # Put together before it is cut up: the pieces of its parts are not those of the whole.
    parts = jnp.split(sharding.constrain(kernel), ends, axis=1) if ends else [kernel]
    out = tuple(
      matmul.project(x, sharding.constrain(part, *cut)) for part, cut in zip(parts, self._cuts)
    )
    return out if ends else out[0]


@contextlib.contextmanager
def mixed_precision(policy: jmp.Policy) -> Iterator[None]:
  """Projections run under `policy`; nothing else does.

  A policy on an outer module would also cast what must stay float32: incoming state, codebook
  sums and counts (in bfloat16, 256 + 1 = 256). So it is pushed for the matrix products alone.
  """
  with hk.mixed_precision.push_policy(Projection, policy):
    yield


def rms_normalize(x: Array) -> Array:
  """Computes x / sqrt(mean x^2 + eps) over the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + _NORM_EPS)


class RMSNorm(hk.Module):
  """RMS normalisation with gain and offset; statistics in float32, output like the input."""

  def __init__(self, *, name: str = "norm"):
    super().__init__(name=name)

  def __call__(self, x: Array) -> Array:
    gain = hk.get_parameter("gain", x.shape[-1:], jnp.float32, init=jnp.ones)
    offset = hk.get_parameter("offset", x.shape[-1:], jnp.float32, init=jnp.zeros)
    return affine.scale_and_shift(rms_normalize(x), gain, offset).astype(x.dtype)


class MLP(hk.Module):
  """The second branch of ungated layers: relu(norm(x) W_1)^2 W_2."""

  def __init__(self, width: int, *, name: str = "mlp"):
    super().__init__(name=name)
    self._width = width

  def __call__(self, x: Array) -> Array:
    """[..., D] -> [..., D], without the residual."""
    hidden = Projection(self._width, columns=("model",), name="up")(RMSNorm(name="norm")(x))
    return Projection(x.shape[-1], rows="model", name="down")(jax.nn.relu(hidden) ** 2)


class TokenEmbedding(hk.Module):
  """Token vectors ~ N(0, 1), which may also serve as the output projection (tied)."""

  def __init__(self, *, n_vocab: int, d_model: int, name: str = "embedding"):
    super().__init__(name=name)
    self._shape = (n_vocab, d_model)

  def _parameters(self) -> tuple[Array, Array]:
    embeddings = hk.get_parameter(
      "embeddings", self._shape, jnp.float32, init=hk.initializers.RandomNormal(1.0)
    )
    embeddings = sharding.constrain(embeddings, "model")
    # Part of the model whether tied or not, like the paper's: parameter totals count it.
    bias = hk.get_parameter("output_bias", self._shape[:1], jnp.float32, init=jnp.zeros)
    return embeddings, bias

  def __call__(self, tokens: Array) -> Array:
    """[B, T] int32 -> [B, T, D] float32; a token out of range becomes NaN, not a neighbour."""
    embeddings, _ = self._parameters()
    beyond = embeddings.shape[0]  # a negative index would count from the end
    return jnp.take(
      embeddings, jnp.where(tokens < 0, beyond, tokens), axis=0, mode="fill", fill_value=jnp.nan
    )

  def logits(self, x: Array) -> Array:
    """[B, T, D] -> [B, T, X] float32."""
    embeddings, bias = self._parameters()
    return (
      matmul.project(x, embeddings.T.astype(x.dtype), preferred_element_type=jnp.float32) + bias
    )


class Unembedding(hk.Module):
  """The untied output projection, with bias; accumulates in float32 whatever the policy."""

  def __init__(self, n_vocab: int, *, name: str = "unembedding"):
    super().__init__(name=name)
    self._n_vocab = n_vocab

  def __call__(self, x: Array) -> Array:
    """[B, T, D] -> [B, T, X] float32."""
    kernel = sharding.constrain(_kernel(x.shape[-1], self._n_vocab), None, "model").astype(x.dtype)
    bias = hk.get_parameter("bias", (self._n_vocab,), jnp.float32, init=jnp.zeros)
    return matmul.project(x, kernel, preferred_element_type=jnp.float32) + bias


class AbsolutePositions(hk.Module):
  """Sinusoids of the position, times one learned scale that starts at 0."""

  def __init__(self, *, width: int, lam: float, name: str = "position"):
    super().__init__(name=name)
    self._width = width
    self._lam = lam

  def __call__(self, index: Array) -> Array:
    """[B, T] int32 -> [B, T, D] float32."""
    scale = hk.get_parameter("scale", (), jnp.float32, init=jnp.zeros)
    return scale * positions.sinusoids(index, width=self._width, lam=self._lam)


def add_branch(
  x: Array,
  branch: Array,
  *,
  p_dropres: float,
  p_droplyr: float,
  rng: Array | None,
  is_training: bool,
) -> Array:
  """Adds a branch; in training entries are dropped by `hk.next_rng_key()`, whole rows by `rng`."""
  if is_training:
    if p_dropres:
      branch = dropout(hk.next_rng_key(), p_dropres, branch)
    branch = dropout(rng, p_droplyr, branch, rows=True)
  return x + branch


def dropout(rng: Array | None, rate: float, x: Array, *, rows: bool = False) -> Array:
  """Zeros entries (or, with `rows`, whole rows of a batch) at `rate`; scales the rest.

  A rate of 0 needs no `rng`.
  """
  if rate == 0.0:
    return x
  shape = (x.shape[0],) + (1,) * (x.ndim - 1) if rows else x.shape
  keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
  return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
