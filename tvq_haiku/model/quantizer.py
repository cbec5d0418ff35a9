"""The codebook as Haiku parameters: two exponential moving averages."""

from __future__ import annotations

import haiku as hk
import jax
import jax.numpy as jnp

from tvq_haiku.attention import quantization
from tvq_haiku.types import Array


class VectorQuantizer(hk.Module):
  """Holds one codebook of S codes for each of G heads."""

  def __init__(self, *, n_head: int, n_code: int, d_k: int, gamma: float, name: str = "quantizer"):
    super().__init__(name=name)
    self._shape = (n_head, n_code, d_k)
    self._gamma = gamma

  def _moments(self) -> tuple[Array, Array]:
    g, s, k = self._shape
    # Untruncated normal of variance 1/(G·S): the same for every key width.
    init = hk.initializers.RandomNormal((g * s) ** -0.5)
    c_sum = hk.get_parameter("c_sum", (g, s, k), jnp.float32, init=init)
    c_count = hk.get_parameter("c_count", (g, s), jnp.float32, init=jnp.ones)
    return c_sum, c_count

  def codebook(self) -> Array:
    """C [G, S, K] in float32, without gradient."""
    return quantization.codebook_of(*self._moments())

  def counts(self) -> Array:
    """The moving average [G, S] of how many keys each code gets per update."""
    return jax.lax.stop_gradient(self._moments()[1])

  def surrogate_loss(
    self, k: Array, codes: Array, mask: Array, *, revive_below: float = 0.0
  ) -> Array:
    """Zero in value; its gradient is the step from the new moving averages to the old.

    Args:
      k: [B, T, G, K] keys of the whole global batch.
      codes: [B, T, G] their codes.
      mask: [B, T] weights: zero keeps a token out of the averages.
      revive_below: codes whose average count is less become some key of this batch, drawn by
        `hk.next_rng_key()`, and count as used once; 0: none do.
    """
    c_sum, c_count = self._moments()
    sums, numbers = quantization.code_statistics(
      jax.lax.stop_gradient(k), codes, mask, self._shape[1]
    )
    d_sum, d_count = (1.0 - self._gamma) * (c_sum - sums), (1.0 - self._gamma) * (c_count - numbers)
    if revive_below:
      keys, is_token = _some_keys(hk.next_rng_key(), k, mask, self._shape[1])
      dead = (c_count < revive_below) & is_token
      d_sum = jnp.where(dead[..., None], c_sum - keys, d_sum)
      d_count = jnp.where(dead, c_count - 1.0, d_count)

    def pull(parameter: Array, gradient: Array) -> Array:
      return jnp.sum(
        jax.lax.stop_gradient(gradient) * (parameter - jax.lax.stop_gradient(parameter))
      )

    return pull(c_sum, d_sum) + pull(c_count, d_count)


def _some_keys(rng: Array, k: Array, mask: Array, n_code: int) -> tuple[Array, Array]:
  """A random one of the keys [B, T, G, K] for each code [G, S, K] f32, and whether it counts [G, S]."""
  B, T, G, K = k.shape
  place = jax.random.randint(rng, (G, n_code), 0, B * T)
  keys = jax.lax.stop_gradient(k).astype(jnp.float32).reshape(B * T, G, K)
  return keys[place, jnp.arange(G)[:, None]], mask.reshape(-1)[place] > 0.0
