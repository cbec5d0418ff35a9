"""Drawing one token from logits."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.types import Array

_ROUNDING = 1e-6  # relative, of a sum of probabilities in float32


@functools.partial(
  jax.tree_util.register_dataclass,
  meta_fields=["top_k"],
  data_fields=["temperature", "top_p", "min_p"],
)
@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How to draw; None switches a rule off. Other numbers need no other compiled program."""

  temperature: float | Array | None = None  # None: the likeliest token
  top_p: float | Array | None = None
  top_k: int | None = None
  min_p: float | Array | None = None


def make_sampling_params(
  *,
  temperature: float = 1.0,
  top_p: float = 1.0,
  top_k: int | None = None,
  min_p: float | None = None,
) -> SamplingParams:
  """The rules as a `SamplingParams`, checked.

  Args:
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: draws from the smallest set of likeliest tokens whose probabilities reach it.
    top_k: draws from that many likeliest tokens.
    min_p: draws from tokens with at least this share of the greatest probability.

  >>> make_sampling(temperature=0.0)
  Sampling(temperature=None, top_p=None, top_k=None, min_p=None)
  """
  for name, value, valid, rule in (
    ("temperature", temperature, 0 <= temperature < float("inf"), "must be a number, not negative"),
    ("top_p", top_p, 0 < top_p <= 1, "must lie in (0, 1]"),
    (
      "top_k",
      top_k,
      top_k is None or top_k == int(top_k) >= 1,
      "must be an integer, at least 1, or None",
    ),
    ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "must lie in [0, 1], or None"),
  ):
    if not valid:
      raise ValueError(f"{name}={value!r} {rule}.")
  if temperature == 0:
    return SamplingParams()
  return SamplingParams(
    float(temperature),
    None if top_p == 1 else float(top_p),
    None if top_k is None else int(top_k),
    None if min_p is None else float(min_p),
  )


def sample_token(rng: Array, logits: Array, sampling: SamplingParams) -> Array:
  """Draws one token from logits [X].

  Probabilities are those of the tempered softmax over all X; the rules are applied to them side by
  side, and none of them ever excludes the likeliest token. Sorts once, or, if neither `top_p` nor
  `top_k` asks for it, not at all.

  >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.3]))
  >>> int(sample_token(jax.random.key(0), logits, make_sampling(top_p=0.5)))
  1
  """
  if sampling.temperature is None:
    return jnp.argmax(logits).astype(jnp.int32)
  scaled = logits / sampling.temperature
  if sampling.top_p is None and sampling.top_k is None:
    kept = scaled
    if sampling.min_p is not None:
      kept = jnp.where(scaled >= jnp.max(scaled) + jnp.log(sampling.min_p), scaled, -jnp.inf)
    return jax.random.categorical(rng, kept).astype(jnp.int32)
  n_candidate = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
  ordered, tokens = jax.lax.top_k(scaled, n_candidate)
  probabilities = jnp.exp(ordered - jax.nn.logsumexp(scaled))
  keep = jnp.ones(ordered.shape, bool)
  if sampling.top_p is not None:
    # The mass of all likelier tokens: below p until the set reaches it, and 0 for the likeliest.
    # What falls short of it by rounding alone has reached it.
    keep &= jnp.cumsum(probabilities) - probabilities < sampling.top_p * (1 - _ROUNDING)
  if sampling.min_p is not None:
    keep &= probabilities >= sampling.min_p * probabilities[0]
  choice = jax.random.categorical(rng, jnp.where(keep, ordered, -jnp.inf))
  return tokens[choice].astype(jnp.int32)


def example_rngs(rng: Array, prompts: list[np.ndarray]) -> Array:
  """One key for each prompt, that does not depend on the other rows of its batch.

  A key is `rng` with the prompt folded in, and with the number of earlier rows with the same
  prompt: equal prompts of one batch go on differently.

  Args:
    rng: one key, or one for each row, which then are taken as they are.
    prompts: B arrays of integers.

  >>> a, b = np.array([1, 2]), np.array([3])
  >>> bool(row_keys(jax.random.key(0), [a, b])[1] == row_keys(jax.random.key(0), [b])[0])
  True
  """
  if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
    rng = jax.random.wrap_key_data(rng)
  if rng.shape == (len(prompts),):
    return rng
  if rng.shape:
    raise ValueError(
      f"rng must be one key, or one for each of {len(prompts)} rows, got shape {rng.shape}."
    )
  seen: dict[bytes, int] = {}
  keys = []
  for prompt in prompts:
    raw = np.asarray(prompt, np.int32).tobytes()
    seen[raw] = seen.get(raw, -1) + 1
    keys.append(jax.random.fold_in(jax.random.fold_in(rng, np.uint32(zlib.crc32(raw))), seen[raw]))
  return jnp.stack(keys)
