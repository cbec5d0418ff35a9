"""The codebook as Haiku parameters: two exponential moving averages.

The update of the averages is the gradient of a surrogate loss: a step of plain SGD with learning
rate 1 subtracts the old average and adds the new one. The codebook therefore needs no state besides
the parameters, and its update is averaged over devices and accumulated over microbatches like every
other gradient.

Letters: B batch, T tokens, G key/value heads, S codes, K key width.
"""

from __future__ import annotations

import chex
import haiku as hk
import jax
import jax.numpy as jnp

from tvq_haiku.attention import quantization
from tvq_haiku.types import Array


class VectorQuantizer(hk.Module):
  """One codebook of S codes for each of G key/value heads."""

  def __init__(self, *, n_head: int, n_code: int, d_k: int, gamma: float, name: str = "quantizer"):
    """Creates the module.

    Args:
      n_head: G.
      n_code: S.
      d_k: K.
      gamma: decay of the moving averages, per update.
      name: name of the module.
    """
    super().__init__(name=name)
    self._shape = (n_head, n_code, d_k)
    self._gamma = gamma

  def _averages(self) -> tuple[Array, Array]:
    """Returns c_sum [G, S, K] and c_count [G, S]."""
    G, S, K = self._shape
    # Not truncated; the variance is 1/(G·S), whatever the key width K.
    init = hk.initializers.RandomNormal((G * S) ** -0.5)
    c_sum = hk.get_parameter("c_sum", (G, S, K), jnp.float32, init=init)
    c_count = hk.get_parameter("c_count", (G, S), jnp.float32, init=jnp.ones)
    return c_sum, c_count

  def codebook(self) -> Array:
    """Returns C [G, S, K] in float32, without gradient."""
    return quantization.codebook_from_averages(*self._averages())

  def counts(self) -> Array:
    """Returns the moving average [G, S] of the number of keys of each code per update."""
    return jax.lax.stop_gradient(self._averages()[1])

  def surrogate_loss(
    self, k: Array, codes: Array, mask: Array, *, revive_below: float = 0.0
  ) -> Array:
    """Returns a loss of value zero whose gradient is the old averages minus the new ones.

    Args:
      k: [B, T, G, K] keys of the global batch.
      codes: [B, T, G] int32 codes of the keys.
      mask: [B, T] weights; tokens of weight zero are excluded from the averages.
      revive_below: a code with a lower average count is replaced by a random key of the batch, with
        a count of 1; `hk.next_rng_key()` is the seed. 0: never.

    Returns:
      [] f32.
    """
    G, S, K = self._shape
    B, T, _, _ = k.shape
    chex.assert_shape((k, codes, mask), [(B, T, G, K), (B, T, G), (B, T)])
    c_sum, c_count = self._averages()
    sums, counts = quantization.code_statistics(jax.lax.stop_gradient(k), codes, mask, S)
    d_sum = (1.0 - self._gamma) * (c_sum - sums)
    d_count = (1.0 - self._gamma) * (c_count - counts)
    if revive_below:
      keys, is_token = _random_keys(hk.next_rng_key(), k, mask, S)
      is_dead = (c_count < revive_below) & is_token
      d_sum = jnp.where(is_dead[..., None], c_sum - keys, d_sum)
      d_count = jnp.where(is_dead, c_count - 1.0, d_count)
    return _with_gradient(c_sum, d_sum) + _with_gradient(c_count, d_count)


def _with_gradient(parameter: Array, gradient: Array) -> Array:
  """Returns a scalar zero whose gradient with respect to `parameter` is `gradient`."""
  stop = jax.lax.stop_gradient
  return jnp.sum(stop(gradient) * (parameter - stop(parameter)))


def _random_keys(rng: Array, k: Array, mask: Array, n_code: int) -> tuple[Array, Array]:
  """Samples one of the keys of the batch for each code.

  Args:
    rng: a JAX random key.
    k: [B, T, G, K] keys.
    mask: [B, T] weights.
    n_code: S.

  Returns:
    The keys [G, S, K] f32, and whether each is the key of an unmasked token [G, S].
  """
  B, T, G, K = k.shape
  index = jax.random.randint(rng, (G, n_code), 0, B * T, jnp.int32)
  keys = jax.lax.stop_gradient(k).astype(jnp.float32).reshape(B * T, G, K)
  return keys[index, jnp.arange(G)[:, None]], mask.reshape(-1)[index] > 0.0
