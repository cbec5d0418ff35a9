"""How fast a model writes, beside how fast memory lets it.

  python -m experiments.benchmarks.decode
  python -m experiments.benchmarks.decode --layers=24 --precision=bfloat16 --batches=1,8,64   # an accelerator

A decode step must read every weight once, and the whole state of every row; it writes one row of
each window and cache. So the bound for a step is
  bytes of weights / bandwidth of matrix-vector products
  + bytes of state read and written / bandwidth of updating arrays in place,
both bandwidths measured on arrays of the model's own shapes, over as many bytes, in turn with the
steps. Every figure is a median. The second part writes on after 1,000 and after 100,000 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import statistics
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments import launcher
from experiments.benchmarks import measure
import tvq_haiku as tvq
from tvq_haiku.generation import decoder, decoder_weights, prefill, sample_loop, sampling, stopping

_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Rows side by side.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Layers of the model.", lower_bound=1)
_PRECISION = flags.DEFINE_string("precision", "float32", "Of the model.")
_HEAD_TYPE = flags.DEFINE_string("head_type", "shga", "shga, mha or mqa (the latter of 8 heads).")
_POSITIONS = flags.DEFINE_list(
  "positions", ["1000", "100000"], "Tokens read before, at batch 1; may be empty."
)
_TOKENS = flags.DEFINE_integer("tokens", 64, "Tokens written by one call.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Calls of each, in turn.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for the rows and the machine.")
_SMOKE = flags.DEFINE_boolean(
  "smoke", False, "A tiny model and few tokens: the path, not the result."
)


def main() -> None:
  config = tvq.TransformerConfig.enwik8(
    n_layer=_LAYERS.value,
    precision=_PRECISION.value,
    head_type=_HEAD_TYPE.value,
    p_dropsin=0.0,
    p_dropres=0.0,
    p_droplyr=0.0,
  )
  if _HEAD_TYPE.value != "shga":
    config = config.replace(n_head=8, d_k=96, d_v=96)
  n, rounds = _TOKENS.value, _ROUNDS.value
  batches = [launcher.parse_positive("batches", text) for text in _BATCHES.value]
  positions = [launcher.parse_positive("positions", text) for text in _POSITIONS.value]
  if _SMOKE.value:
    config, n, rounds = tvq.TransformerConfig.tiny(precision=_PRECISION.value), 8, 2
    positions = [min(position, 100) for position in positions]
  params = tvq.make_transformer(config).init(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32), tvq.initial_state(config, 1)
  )
  weights = jax.block_until_ready(decoder_weights.prepare_weights(config, params))

  rows = []
  for B in batches:
    state = tvq.initial_state(config, B)
    rates = dict(
      weights=_Products(weights),
      state=_Updates(decoder.start_decoding(config, state)),
      step=_Steps(config, params, weights, B, 8, n),
    )
    times = _in_turn(rates, rounds)
    read, written = _state_traffic(config, rates["state"].n_byte, B)
    weight_rate = rates["weights"].n_byte / times["weights"]
    state_rate = 2 * rates["state"].n_byte / times["state"]
    bound = rates["weights"].n_byte / weight_rate + (read + written) / state_rate
    rows.append(
      dict(
        batch=B,
        position=8,
        seconds_per_step=times["step"] / n,
        tokens_per_second=B * n / times["step"],
        of_bound=bound * n / times["step"],
        bound_seconds=bound,
        weight_mbytes=rates["weights"].n_byte / 1e6,
        state_mbytes=read / 1e6,
        weight_gbytes_per_second=weight_rate / 1e9,
        state_gbytes_per_second=state_rate / 1e9,
      )
    )
  if positions:
    places = {str(p): _Steps(config, params, weights, 1, p, n) for p in positions}
    for place, seconds in _in_turn(places, rounds).items():
      rows.append(
        dict(
          batch=1, position=int(place), seconds_per_step=seconds / n, tokens_per_second=n / seconds
        )
      )
  _print(rows)
  if _JSON.value:
    measure.write_json(_JSON.value, rows, config=config.to_json())


class _Steps:
  """Writes n tokens after `position` random ones."""

  def __init__(
    self, config: tvq.TransformerConfig, params: Any, weights: Any, B: int, position: int, n: int
  ):
    tokens = np.random.default_rng(0).integers(3, config.n_vocab, (B, position)).astype(np.int32)
    state, logits = prefill.prefill(params, config, list(tokens), tvq.initial_state(config, B))
    self._now = sample_loop.start_generation(config, state, logits, stopping.StopConditions())
    self._write = functools.partial(
      sample_loop.sample_tokens,
      config,
      weights,
      rngs=jax.random.split(jax.random.key(1), B),
      sampling_params=sampling.make_sampling_params(),
      limit=n,
      chunk_len=n,
      stop=stopping.StopConditions(),
    )

  def __call__(self) -> Any:
    drawn, self._now = self._write(state=self._now)
    return drawn


class _Products:
  """One product of a vector with each matrix of the model, each waiting for the one before."""

  def __init__(self, weights: decoder_weights.DecoderWeights):
    matrices = [x for x in jax.tree.leaves(weights) if x.ndim >= 2 and x.size > 1]
    self.n_byte = sum(x.nbytes for x in jax.tree.leaves(weights))
    self._matrices = [x.reshape(-1, x.shape[-1]) for x in matrices]

    @jax.jit
    def products(matrices: list[jax.Array]) -> jax.Array:
      total = jnp.zeros(())
      for x in matrices:
        vector = jnp.ones((x.shape[1],), x.dtype) + total.astype(x.dtype)
        total = 1e-9 * jnp.sum((x @ vector).astype(jnp.float32))
      return total

    self._products = products

  def __call__(self) -> Any:
    return self._products(self._matrices)


class _Updates:
  """Multiplies every array of a state by a number, in place."""

  def __init__(self, state: Any):
    self._arrays = [
      jnp.ones_like(x)
      for x in jax.tree.leaves(state.buffers)
      if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    self.n_byte = sum(x.nbytes for x in self._arrays)
    self._update = jax.jit(
      lambda arrays: [x * jnp.asarray(0.999, x.dtype) for x in arrays], donate_argnums=0
    )

  def __call__(self) -> Any:
    self._arrays = self._update(self._arrays)
    return self._arrays


def _state_traffic(config: tvq.TransformerConfig, n_byte: int, B: int) -> tuple[int, int]:
  """Bytes of the state that a step must read and write: all of it, and one row of each array."""
  c = config
  width = c.d_k * 4 + c.d_v * c.compute_dtype.itemsize + c.d_v * 4
  return n_byte, B * c.n_layer * (2 if c.gated else 1) * c.kv_heads * width


def _in_turn(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
  times: dict[str, list[float]] = {name: [] for name in cases}
  for case in cases.values():
    for _ in range(2):
      jax.block_until_ready(case())
  for _ in range(rounds):
    for name, case in cases.items():
      start = time.perf_counter()
      jax.block_until_ready(case())
      times[name].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in times.items()}


def _print(rows: list[dict[str, Any]]) -> None:
  print("batch  position  ms a step  tokens/s  of bound  weights MB at GB/s  state MB at GB/s")
  for row in rows:
    line = (
      f"{row['batch']:5d}  {row['position']:8,d}  {1e3 * row['seconds_per_step']:9.3f}  "
      f"{row['tokens_per_second']:8,.0f}"
    )
    if "of_bound" in row:
      line += f"  {row['of_bound']:8.2f}"
      for part, width in (("weight", 10), ("state", 8)):
        line += f"  {row[part + '_mbytes']:{width}.1f} {row[part + '_gbytes_per_second']:7.1f}"
    print(line)


if __name__ == "__main__":
  launcher.launch("decode", main)
