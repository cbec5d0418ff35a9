"""Small layers with parameters: projections, norm, MLP, embeddings; and dropout.

Letters: B batch, T tokens, D model width, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import itertools

import chex
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
  """Multiplies by a kernel W ~ N(0, 1/fan_in), in the dtypes of the mixed-precision policy.

  Several widths share one kernel. The kernel is split before it is multiplied, because this is
  cheaper than splitting x W: the gradient of that split concatenates activations.

  Args:
    *widths: output widths; one output for each.
    rows: mesh axes that shard the input dimension of the kernel.
    columns: for each width, the mesh axes that shard these output columns. Empty: not sharded.
    name: name of the module.
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
    self._rows = rows
    self._columns = columns or (None,) * len(widths)

  def __call__(self, x: Array) -> Array | tuple[Array, ...]:
    """Returns x W: [..., D] -> [..., width], or a tuple of these if there are several widths."""
    chex.assert_type(x, float)
    kernel = _kernel(x.shape[-1], sum(self._widths))
    parts = [kernel]
    if len(self._widths) > 1:
      # All-gather before splitting: shards of the fused kernel don't align with its parts.
      boundaries = list(itertools.accumulate(self._widths[:-1]))
      parts = jnp.split(sharding.constrain(kernel), boundaries, axis=1)
    outputs = tuple(
      matmul.project(x, sharding.constrain(part, self._rows, columns))  # ...d,de->...e
      for part, columns in zip(parts, self._columns, strict=True)
    )
    return outputs if len(outputs) > 1 else outputs[0]


@contextlib.contextmanager
def mixed_precision(policy: jmp.Policy) -> Iterator[None]:
  """Applies `policy` to the projections that are called inside the context, and to nothing else.

  A policy on an outer module would also cast arrays that must stay float32: incoming state,
  codebook sums and counts. `TransformerConfig.policy` lists the dtypes of all arrays.
  """
  with hk.mixed_precision.push_policy(Projection, policy):
    yield


def rms_normalize(x: Array) -> Array:
  """Computes x / sqrt(mean x^2 + eps) over the last axis, in float32."""
  chex.assert_type(x, float)
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + _NORM_EPS)


class RMSNorm(hk.Module):
  """RMS normalization with gain and offset; computed in float32, returned in the input's dtype."""

  def __init__(self, *, name: str = "norm"):
    super().__init__(name=name)

  def __call__(self, x: Array) -> Array:
    """Normalizes the last axis: [..., D] -> [..., D]."""
    chex.assert_type(x, float)
    gain = hk.get_parameter("gain", x.shape[-1:], jnp.float32, init=jnp.ones)
    offset = hk.get_parameter("offset", x.shape[-1:], jnp.float32, init=jnp.zeros)
    return affine.scale_and_shift(rms_normalize(x), gain, offset).astype(x.dtype)


class MLP(hk.Module):
  """The second branch of an ungated layer: relu(norm(x) W_up)^2 W_down."""

  def __init__(self, width: int, *, name: str = "mlp"):
    super().__init__(name=name)
    self._width = width

  def __call__(self, x: Array) -> Array:
    """Returns the output of the branch, without the residual: [..., D] -> [..., D]."""
    chex.assert_type(x, float)
    normed = RMSNorm(name="norm")(x)
    hidden = Projection(self._width, columns=("model",), name="up")(normed)
    return Projection(x.shape[-1], rows="model", name="down")(jax.nn.relu(hidden) ** 2)


class TokenEmbedding(hk.Module):
  """Token embeddings ~ N(0, 1), which may also serve as the (tied) output projection."""

  def __init__(self, *, n_vocab: int, d_model: int, name: str = "embedding"):
    super().__init__(name=name)
    self._shape = (n_vocab, d_model)

  def _parameters(self) -> tuple[Array, Array]:
    """Returns the embeddings [X, D] and the bias of the tied output projection [X], float32."""
    init = hk.initializers.RandomNormal(1.0)
    embeddings = hk.get_parameter("embeddings", self._shape, jnp.float32, init=init)
    # The bias exists even if it is unused, because the paper's parameter totals count it.
    bias = hk.get_parameter("output_bias", self._shape[:1], jnp.float32, init=jnp.zeros)
    return sharding.constrain(embeddings, "model"), bias

  def __call__(self, tokens: Array) -> Array:
    """Embeds tokens: [B, T] int32 -> [B, T, D] float32; NaN for tokens that are out of range."""
    chex.assert_rank(tokens, 2)
    chex.assert_type(tokens, int)
    embeddings, _ = self._parameters()
    return look_up_embeddings(embeddings, tokens)

  def logits(self, x: Array) -> Array:
    """Applies the tied output projection: [B, T, D] -> [B, T, X] float32."""
    chex.assert_shape(x, (None, None, self._shape[1]))
    embeddings, bias = self._parameters()
    kernel = embeddings.T.astype(x.dtype)
    logits = matmul.project(x, kernel, preferred_element_type=jnp.float32)  # btd,dx->btx
    return logits + bias


def look_up_embeddings(embeddings: Array, tokens: Array) -> Array:
  """Returns the rows [..., D] of embeddings [X, D] of tokens [...]; NaN if out of range."""
  # jnp.take would count a negative index from the end, so it is replaced by one past the table.
  tokens = jnp.where(tokens < 0, embeddings.shape[0], tokens)
  return jnp.take(embeddings, tokens, axis=0, mode="fill", fill_value=jnp.nan)


class Unembedding(hk.Module):
  """The untied output projection, with bias; accumulates in float32 under every policy."""

  def __init__(self, n_vocab: int, *, name: str = "unembedding"):
    super().__init__(name=name)
    self._n_vocab = n_vocab

  def __call__(self, x: Array) -> Array:
    """Returns logits: [B, T, D] -> [B, T, X] float32."""
    chex.assert_rank(x, 3)
    kernel = sharding.constrain(_kernel(x.shape[-1], self._n_vocab), None, "model").astype(x.dtype)
    bias = hk.get_parameter("bias", (self._n_vocab,), jnp.float32, init=jnp.zeros)
    logits = matmul.project(x, kernel, preferred_element_type=jnp.float32)  # btd,dx->btx
    return logits + bias


class AbsolutePositions(hk.Module):
  """Sinusoids of the positions, times one learned scale that is initialized to 0.

  Args:
    width: D, even.
    lam: base of the wavelengths; see `positions.sinusoids`.
    name: name of the module.
  """

  def __init__(self, *, width: int, lam: float, name: str = "position"):
    super().__init__(name=name)
    self._width = width
    self._lam = lam

  def __call__(self, position_ids: Array) -> Array:
    """Embeds positions: [B, T] int32 -> [B, T, D] float32."""
    chex.assert_rank(position_ids, 2)
    chex.assert_type(position_ids, int)
    scale = hk.get_parameter("scale", (), jnp.float32, init=jnp.zeros)
    return scale * positions.sinusoids(position_ids, width=self._width, lam=self._lam)


def add_branch(
  x: Array,
  branch: Array,
  *,
  p_dropres: float,
  p_droplyr: float,
  rng: Array | None,
  is_training: bool,
) -> Array:
  """Adds the output of a branch to the residual stream; applies dropout during training.

  Args:
    x: [B, T, D] residual stream.
    branch: [B, T, D] output of the branch.
    p_dropres: rate at which single entries are dropped, with a mask from `hk.next_rng_key()`.
    p_droplyr: rate at which the branch is dropped for a batch element (LayerDrop).
    rng: key of the LayerDrop mask, equal for all windows of a sequence. None: p_droplyr is 0.
    is_training: whether to apply dropout.

  Returns:
    [B, T, D].
  """
  chex.assert_rank(x, 3)
  chex.assert_equal_shape([x, branch])
  if is_training:
    if p_dropres:
      branch = dropout(hk.next_rng_key(), p_dropres, branch)
    branch = dropout(rng, p_droplyr, branch, per_example=True)
  return x + branch


def dropout(rng: Array | None, rate: float, x: Array, *, per_example: bool = False) -> Array:
  """Zeros entries at random, and scales the others by 1/(1 - rate).

  Args:
    rng: key of the mask. It may be None if `rate` is 0.
    rate: probability of an entry to be zeroed, in [0, 1).
    x: [B, ...].
    per_example: zero all entries of a batch element together.

  Returns:
    An array like `x`.
  """
  chex.assert_type(x, float)
  if rate == 0.0:
    return x
  shape = (x.shape[0],) + (1,) * (x.ndim - 1) if per_example else x.shape
  keep = jax.random.bernoulli(rng, jnp.float32(1.0 - rate), shape)
  return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
