"""Measures how fast a model generates text, relative to a bound from the memory bandwidth.

  python -m experiments.benchmarks.decode
  python -m experiments.benchmarks.decode --layers=24 --precision=bfloat16 --batches=1,8,64

A decode step reads all weights and the state of every batch element once, and writes one entry of
each window and each cache. The bound on the duration of a step is therefore
  bytes of weights / bandwidth of matrix-vector products
  + bytes of state that are read and written / bandwidth of in-place updates.
Both bandwidths are measured in alternation with the steps, on arrays of the same shapes as the
model's. All times are medians. The second part of the table lists steps at batch size 1, after
1,000 and after 100,000 tokens of context.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from collections.abc import Callable, Mapping, Sequence
import functools
import statistics
from typing import Any, NamedTuple, TypeVar

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments import launcher
from experiments.benchmarks import measure
import tvq_haiku as tvq
from tvq_haiku.generation import decoder, decoder_weights, prefill, sample_loop, sampling, stopping
from tvq_haiku.types import Array, ArrayTree, Params

_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Batch sizes.")
_LAYERS = flags.DEFINE_integer("layers", 2, "Number of layers of the model.", lower_bound=1)
_PRECISION = flags.DEFINE_string(
  "precision", "float32", "Precision of the model: float32 or bfloat16."
)
_HEAD_TYPE = flags.DEFINE_string(
  "head_type", "shga", "Head type: shga, or mha or mqa with 8 heads."
)
_POSITIONS = flags.DEFINE_list(
  "positions",
  ["1000", "100000"],
  "Numbers of tokens of context for the second part, at batch size 1; may be empty.",
)
_TOKENS = flags.DEFINE_integer(
  "tokens", 64, "Number of tokens to generate per call.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 15, "Number of measured calls of each case, in alternation.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "File to write the results to. Default: none.")
_SMOKE = flags.DEFINE_boolean(
  "smoke", False, "Measure a tiny model briefly, to check that the benchmark works."
)

_FIRST_POSITION = 8  # tokens of context in the first part
_WARMUP_CALLS = 2

Name = TypeVar("Name", str, int)


class Model(NamedTuple):
  """A model with random parameters."""

  config: tvq.TransformerConfig
  params: Params
  weights: decoder_weights.DecoderWeights  # the parameters in the layout for decoding


def main() -> None:
  """Prints the table, and writes it to --json."""
  batch_sizes = [launcher.parse_positive("batches", text) for text in _BATCHES.value]
  positions = [launcher.parse_positive("positions", text) for text in _POSITIONS.value]
  n_token, rounds = _TOKENS.value, _ROUNDS.value
  config = _make_config(_HEAD_TYPE.value, n_layer=_LAYERS.value, precision=_PRECISION.value)
  if _SMOKE.value:
    config, n_token, rounds = tvq.TransformerConfig.tiny(precision=_PRECISION.value), 8, 2
    positions = [min(position, 100) for position in positions]
  model = _random_model(config)
  rows = [_measure_batch(model, batch_size, n_token, rounds) for batch_size in batch_sizes]
  rows += _measure_positions(model, positions, n_token, rounds)
  _print_table(rows)
  if _JSON.value:
    measure.write_json(_JSON.value, rows, config=config.to_json())


def _make_config(head_type: str, **changes: int | str) -> tvq.TransformerConfig:
  """Returns the paper's enwik8 model without dropout, with some fields changed."""
  no_dropout = dict(p_dropsin=0.0, p_dropres=0.0, p_droplyr=0.0)
  config = tvq.TransformerConfig.enwik8(head_type=head_type, **no_dropout, **changes)
  return config if head_type == "shga" else config.replace(n_head=8, d_k=96, d_v=96)


def _random_model(config: tvq.TransformerConfig) -> Model:
  params = tvq.make_transformer(config).init(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32), tvq.initial_state(config, 1)
  )
  weights = jax.block_until_ready(decoder_weights.prepare_weights(params, config))
  return Model(config, params, weights)


def _measure_batch(model: Model, batch_size: int, n_token: int, rounds: int) -> dict[str, Any]:
  """Measures steps and both bandwidths at one batch size.

  Args:
    model: the model.
    batch_size: number of texts B.
    n_token: number of tokens per call.
    rounds: number of measured calls.

  Returns:
    A row of the table.
  """
  state = decoder.start_decoding(model.config, tvq.initial_state(model.config, batch_size))
  products, updates = MatrixVectorProducts(model.weights), InPlaceUpdates(state)
  steps = DecodeSteps(model, batch_size, _FIRST_POSITION, n_token)
  times = _median_times(dict(products=products, updates=updates, steps=steps), rounds)
  weight_rate = products.n_byte / times["products"]
  state_rate = 2 * updates.n_byte / times["updates"]
  state_traffic = updates.n_byte + _bytes_written(model.config, batch_size)
  bound = products.n_byte / weight_rate + state_traffic / state_rate
  return dict(
    batch=batch_size,
    position=_FIRST_POSITION,
    seconds_per_step=times["steps"] / n_token,
    tokens_per_second=batch_size * n_token / times["steps"],
    of_bound=bound * n_token / times["steps"],
    bound_seconds=bound,
    weight_mbytes=products.n_byte / 1e6,
    state_mbytes=updates.n_byte / 1e6,
    weight_gbytes_per_second=weight_rate / 1e9,
    state_gbytes_per_second=state_rate / 1e9,
  )


def _measure_positions(
  model: Model, positions: Sequence[int], n_token: int, rounds: int
) -> list[dict[str, Any]]:
  """Measures steps at batch size 1, after different numbers of tokens.

  Args:
    model: the model.
    positions: numbers of tokens of context.
    n_token: number of tokens per call.
    rounds: number of measured calls.

  Returns:
    One row of the table per position.
  """
  cases = {position: DecodeSteps(model, 1, position, n_token) for position in positions}
  return [
    dict(
      batch=1,
      position=position,
      seconds_per_step=seconds / n_token,
      tokens_per_second=n_token / seconds,
    )
    for position, seconds in _median_times(cases, rounds).items()
  ]


class DecodeSteps:
  """Generates `n_token` tokens per call, after `position` random tokens of context."""

  def __init__(self, model: Model, batch_size: int, position: int, n_token: int):
    config, params, weights = model
    shape, stop = (batch_size, position), stopping.make_stop_conditions()
    tokens = np.random.default_rng(0).integers(3, config.n_vocab, shape).astype(np.int32)
    state, logits = prefill.prefill(
      params, config, list(tokens), tvq.initial_state(config, batch_size)
    )
    self._state = sample_loop.start_generation(config, state, logits, stop)
    self._sample = functools.partial(
      sample_loop.sample_tokens,
      weights,
      config,
      rngs=jax.random.split(jax.random.key(1), batch_size),
      sampling_params=sampling.make_sampling_params(),
      limit=n_token,
      chunk_len=n_token,
      stop=stop,
    )

  def __call__(self) -> ArrayTree:
    """Generates the next tokens of every text and returns them."""
    tokens, self._state = self._sample(state=self._state)
    return tokens


class MatrixVectorProducts:
  """Multiplies the weight matrices of the model by vectors, one after the other."""

  def __init__(self, weights: decoder_weights.DecoderWeights):
    leaves = jax.tree.leaves(weights)
    self.n_byte = sum(x.nbytes for x in leaves)
    self._matrices = [x.reshape(-1, x.shape[-1]) for x in leaves if x.ndim >= 2 and x.size > 1]

    @jax.jit
    def multiply_all(matrices: list[Array]) -> Array:
      total = jnp.zeros(())
      for x in matrices:
        # Each vector depends on the previous product, so that the products cannot overlap.
        vector = jnp.ones((x.shape[1],), x.dtype) + total.astype(x.dtype)
        total = 1e-9 * jnp.sum((x @ vector).astype(jnp.float32))
      return total

    self._multiply_all = multiply_all

  def __call__(self) -> ArrayTree:
    """Computes all products and returns a number that depends on all of them."""
    return self._multiply_all(self._matrices)


class InPlaceUpdates:
  """Multiplies every floating-point array of a decode state by a constant, in place."""

  def __init__(self, state: decoder.DecodeState):
    self._arrays = [
      jnp.ones_like(x)
      for x in jax.tree.leaves(state.buffers)
      if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    self.n_byte = sum(x.nbytes for x in self._arrays)
    self._update = jax.jit(
      lambda arrays: [x * jnp.asarray(0.999, x.dtype) for x in arrays], donate_argnums=0
    )

  def __call__(self) -> ArrayTree:
    """Updates all arrays and returns them."""
    self._arrays = self._update(self._arrays)
    return self._arrays


def _bytes_written(config: tvq.TransformerConfig, batch_size: int) -> int:
  """Returns the bytes of state that a step writes: a key, a value and a mean per key/value head."""
  c = config
  bytes_per_head = c.d_k * 4 + c.d_v * c.compute_dtype.itemsize + c.d_v * 4
  n_attention = c.n_layer * (2 if c.gated else 1)
  return batch_size * n_attention * c.kv_heads * bytes_per_head


def _median_times(cases: Mapping[Name, Callable[[], ArrayTree]], rounds: int) -> dict[Name, float]:
  """Returns the median duration of a call of each case, in seconds; the cases alternate."""
  times: dict[Name, list[float]] = {name: [] for name in cases}
  for run in cases.values():
    for _ in range(_WARMUP_CALLS):
      jax.block_until_ready(run())
  for _ in range(rounds):
    for name, run in cases.items():
      times[name].append(measure.time_call(run))
  return {name: statistics.median(values) for name, values in times.items()}


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
  print("batch  position    ms/step  tokens/s  of bound  weights MB at GB/s  state MB at GB/s")
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
