"""Sampling one token from logits, with temperature, top-p, top-k and min-p.

Letters: B batch, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.ops import padding
from tvq_haiku.types import Array
from tvq_haiku.utils import value_checks

_ROUNDING = 1e-6  # relative error of a sum of probabilities in float32
_MIN_CANDIDATES = 256  # so that most values of top_k share a compiled program
_MAX_TOP_K = 1 << 30  # fits into an int32
_MIN_TEMPERATURE = float(np.finfo(np.float32).tiny)  # smaller float32 numbers become 0


@functools.partial(
  jax.tree_util.register_dataclass,
  meta_fields=["n_candidate"],
  data_fields=["temperature", "top_p", "top_k", "min_p"],
)
@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """Sampling parameters. None disables a filter; changing a value does not recompile.

  But a `top_k` that needs a larger power of two as `n_candidate` does recompile.
  """

  temperature: float | Array | None = None  # [] f32, > 0; None: always take the most probable token
  top_p: float | Array | None = None  # [] f32 in (0, 1)
  top_k: int | Array | None = None  # [] int32, >= 1
  min_p: float | Array | None = None  # [] f32 in [0, 1]
  n_candidate: int | None = None  # >= top_k: number of most probable tokens to sort; None: all


def make_sampling_params(
  *,
  temperature: float = 1.0,
  top_p: float = 1.0,
  top_k: int | None = None,
  min_p: float | None = None,
  caller: str = "make_sampling_params",
) -> SamplingParams:
  """Checks sampling parameters and converts them to `SamplingParams`.

  Args:
    temperature: divides the logits; 0 takes the most probable token, and so does a temperature that
      float32 rounds to 0.
    top_p: samples from the smallest set of most probable tokens whose probabilities add up to at
      least this number; 1 disables the filter.
    top_k: samples from this number of most probable tokens; None disables the filter.
    min_p: samples from tokens whose probability is at least this fraction of the highest one; None
      disables the filter.
    caller: name of the public function, for error messages.

  Returns:
    The parameters, with None for each disabled filter; all are None if `temperature` is 0.

  Raises:
    ValueError: an argument is not a number or is out of range; the message names it.

  >>> make_sampling_params(temperature=0.0) == SamplingParams()
  True
  """
  temperature = value_checks.check_number(
    caller,
    "temperature",
    temperature,
    lambda x: 0 <= x < math.inf,
    "must be a finite number of at least 0 (0 takes the most probable token)",
  )
  top_p = value_checks.check_number(
    caller, "top_p", top_p, lambda x: 0 < x <= 1, "must be a number in (0, 1] (1: no filter)"
  )
  if top_k is not None:
    top_k = min(value_checks.check_integer(caller, "top_k", top_k), _MAX_TOP_K)
  if min_p is not None:
    min_p = value_checks.check_number(
      caller, "min_p", min_p, lambda x: 0 <= x <= 1, "must be None or a number in [0, 1]"
    )
  if temperature < _MIN_TEMPERATURE:
    return SamplingParams()
  n_candidate = None
  if top_k is not None:
    n_candidate = max(_MIN_CANDIDATES, padding.round_up_to_power_of_two(top_k))
  return SamplingParams(
    temperature=temperature,
    top_p=None if top_p == 1 else top_p,
    top_k=top_k,
    min_p=min_p,
    n_candidate=n_candidate,
  )


def sample_token(rng: Array, logits: Array, params: SamplingParams) -> Array:
  """Samples one token.

  All filters apply to the probabilities of softmax(logits / temperature) over all X tokens, so
  their order does not matter. No filter ever excludes the most probable token. The logits are
  sorted once if `top_p` or `top_k` is given, and not at all otherwise.

  Args:
    rng: one typed key.
    logits: [X] f32.
    params: from `make_sampling_params`.

  Returns:
    [] int32, in [0, X).

  >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
  >>> int(sample_token(jax.random.key(0), logits, make_sampling_params(top_p=0.5)))
  1
  """
  chex.assert_rank(logits, 1)
  if params.temperature is None:
    return jnp.argmax(logits).astype(jnp.int32)
  # The highest logit becomes 0, so that no quotient overflows; lower ones may become -inf.
  scaled = (logits - jnp.max(logits)) / params.temperature
  if params.top_p is None and params.top_k is None:
    if params.min_p is not None:
      scaled = jnp.where(scaled >= jnp.log(params.min_p), scaled, -jnp.inf)
    return jax.random.categorical(rng, scaled).astype(jnp.int32)
  n_candidate = min(params.n_candidate or logits.shape[-1], logits.shape[-1])
  candidates, tokens = jax.lax.top_k(scaled, n_candidate)  # most probable first
  probabilities = jnp.exp(candidates - jax.nn.logsumexp(scaled))
  kept = jnp.ones(candidates.shape, bool)
  if params.top_k is not None:
    kept &= jnp.arange(n_candidate) < params.top_k
  if params.top_p is not None:
    # A token is kept if the probabilities of the tokens before it add up to less than p. A sum that
    # is less than p only by rounding counts as p.
    mass_before = jnp.cumsum(probabilities) - probabilities
    kept &= mass_before < params.top_p * (1 - _ROUNDING)
  if params.min_p is not None:
    kept &= probabilities >= params.min_p * probabilities[0]
  # If float32 rounds p to 0, no token is kept. Then the choice is the first one, too.
  choice = jax.random.categorical(rng, jnp.where(kept, candidates, -jnp.inf))
  return tokens[choice].astype(jnp.int32)


def example_rngs(
  rng: Array, prompts: Sequence[np.ndarray], *, caller: str = "example_rngs"
) -> Array:
  """Derives a key for each prompt, which does not depend on different prompts in the batch.

  Folds a checksum of the prompt into `rng`, and then the number of earlier prompts in the batch
  that are equal to it. So equal prompts get different keys.

  Args:
    rng: one key; or [B] keys, one for each prompt, which are returned as they are.
    prompts: B arrays of integers, of any lengths.
    caller: name of the public function, for error messages.

  Returns:
    [B] typed keys.

  Raises:
    TypeError: `rng` is not a key.
    ValueError: `rng` has a different shape.

  >>> a, b = np.array([1, 2]), np.array([3])
  >>> rng = jax.random.key(0)
  >>> bool(example_rngs(rng, [a, b])[1] == example_rngs(rng, [b])[0])
  True
  """
  rng = value_checks.check_key(caller, rng)
  if rng.shape == (len(prompts),):
    return rng
  if rng.shape:
    raise ValueError(
      f"{caller}: rng must be one key, or one for each of {len(prompts)} prompts, got keys of "
      f"shape {rng.shape}."
    )
  n_seen: dict[bytes, int] = {}
  rngs = []
  for prompt in prompts:
    content = np.asarray(prompt, np.int32).tobytes()
    n_earlier = n_seen.get(content, 0)
    n_seen[content] = n_earlier + 1
    prompt_rng = jax.random.fold_in(rng, np.uint32(zlib.crc32(content)))
    rngs.append(jax.random.fold_in(prompt_rng, n_earlier))
  return jnp.stack(rngs)
