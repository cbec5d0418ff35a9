"""Measures the speed and temporary memory of one attention operation, forward and backward.

  python -m experiments.benchmarks.attention --seq_lens=8192

The rows of the table are `vq_attention` with each reduction, with and without rematerialization of
the scores of a block (remat), and quadratic attention. The last line is the size of the caches of
all blocks, R·S·V numbers, for comparison.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from collections.abc import Callable
import pathlib
from typing import NamedTuple

from absl import flags
import jax
import jax.numpy as jnp

from experiments import launcher
from experiments.benchmarks import measure
import tvq_haiku as tvq
from tvq_haiku.attention import full
from tvq_haiku.attention import state as state_lib
from tvq_haiku.types import Array
from tvq_haiku.utils import files

_SEQ_LENS = flags.DEFINE_list("seq_lens", ["8192"], "Sequence lengths T in tokens.")
_REDUCTIONS = flags.DEFINE_list(
  "reductions", ["scan", "serial", "matmul", "assoc_scan"], "Reductions of vq_attention."
)
_FULL = flags.DEFINE_boolean("full", True, "Whether to measure quadratic attention, too.")
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Number of measured calls of each case.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File to write the results to. Default: none.")
_SMOKE = flags.DEFINE_boolean(
  "smoke", False, "Measure tiny cases once, to check that the benchmark works."
)

_COLUMNS = ("T", "model", "reduction", "remat")

Arrays = dict[str, Array]


class Sizes(NamedTuple):
  """Sizes of an attention operation with one head; blocks are as long as the memory (L = M)."""

  d_k: int  # K
  d_v: int  # V
  n_code: int  # S
  mem_len: int  # M


_SIZES, _SMOKE_SIZES = Sizes(64, 512, 256, 256), Sizes(4, 8, 8, 8)
_SMOKE_LENGTH = 64


def main() -> None:
  """Prints the table, and writes it to --json."""
  smoke, sizes = _SMOKE.value, _SMOKE_SIZES if _SMOKE.value else _SIZES
  if _JSON.value:  # fails before the measurements, not after them
    files.prepare_directory(pathlib.Path(_JSON.value).parent)
  lengths = [launcher.parse_positive("seq_lens", text) for text in _SEQ_LENS.value]
  lengths = [_SMOKE_LENGTH] if smoke else lengths
  cases = []
  for length in lengths:
    cases += [
      _quantized_case(length, sizes, reduction, remat)
      for reduction in _REDUCTIONS.value
      for remat in (False, True)
    ]
    if _FULL.value:
      cases.append(_full_case(length, sizes))
  rows = measure.compare(
    cases, rounds=1 if smoke else _ROUNDS.value, peak_size=64 if smoke else None
  )
  measure.print_table(rows, _COLUMNS)
  K, V, S, M = sizes
  for length in lengths:
    megabytes = 4e-6 * (length // M) * S * V
    print(f"T={length}: the caches of all blocks (R·S·V numbers) take {megabytes:.1f} MB")
  if _JSON.value:
    measure.write_json(_JSON.value, rows, benchmark="attention", K=K, V=V, S=S, M=M, L=M)


def _quantized_case(length: int, sizes: Sizes, reduction: str, remat: bool) -> measure.Case:
  """Returns the case that measures `vq_attention` over `length` tokens."""
  K, V, S, M = sizes
  codebook = jax.random.normal(jax.random.key(1), (1, S, K))

  def attention(arrays: Arrays) -> Array:
    return tvq.vq_attention(
      **_add_axes(arrays),
      codebook=codebook,
      mem_len=M,
      block_len=M,
      reduction=reduction,
      remat=remat,
    ).values.reshape(length, V)

  settings = dict(T=length, model="vq", reduction=reduction, remat="block" if remat else "none")
  n_relative = M + 1
  multiply_adds = length * (S * K + (2 * M + S + n_relative) * K + (2 * M + S) * V)
  return _make_case(settings, attention, _random_arrays(length, K, V, n_relative), multiply_adds)


def _full_case(length: int, sizes: Sizes) -> measure.Case:
  """Returns the case that measures quadratic attention over `length` tokens."""
  K, V, *_ = sizes
  state = state_lib.initial_key_value_state(
    batch_size=1, n_kv_head=1, mem_len=length, d_k=K, d_v=V, dtype=jnp.float32
  )

  def attention(arrays: Arrays) -> Array:
    return full.full_attention(**_add_axes(arrays), state=state).values.reshape(length, V)

  settings = dict(T=length, model="full", reduction="-", remat="tiles")
  multiply_adds = length * (length + 1) // 2 * (2 * K + V)
  return _make_case(settings, attention, _random_arrays(length, K, V, length + 1), multiply_adds)


def _make_case(
  settings: dict[str, int | str],
  attention: Callable[[Arrays], Array],
  arrays: Arrays,
  multiply_adds: int,
) -> measure.Case:
  """Returns a case that computes attention and the gradients with respect to its inputs.

  Args:
    settings: columns of the table.
    attention: maps the arrays to the output [T, V].
    arrays: the inputs, from `_random_arrays`.
    multiply_adds: number of multiply-adds of the forward pass.
  """
  gradient = jax.random.normal(jax.random.key(9), arrays["v"].shape)

  def value_and_gradients(arrays: Arrays, gradient: Array) -> tuple[Array, tuple[Arrays]]:
    values, backward = jax.vjp(attention, arrays)
    return values, backward(gradient)

  compiled = measure.compile_program(value_and_gradients, arrays, gradient)
  return measure.Case(
    name=" ".join(map(str, settings.values())),
    settings=settings,
    run=lambda: compiled.program(arrays, gradient),
    n_token=arrays["v"].shape[0],
    model_flops=6.0 * multiply_adds,
    compile_seconds=compiled.seconds,
    temp_bytes=compiled.temp_bytes,
  )


def _random_arrays(length: int, K: int, V: int, n_relative: int) -> Arrays:
  """Returns random inputs of an attention operation, without batch and head axes."""
  shapes = dict(
    q=(length, K),
    k=(length, K),
    v=(length, V),
    relative_keys=(n_relative, K),
    content_bias=(K,),
    position_bias=(K,),
  )
  rngs = jax.random.split(jax.random.key(0), len(shapes))
  return {
    name: jax.random.normal(rng, shape)
    for rng, (name, shape) in zip(rngs, shapes.items(), strict=True)
  }


def _add_axes(arrays: Arrays) -> Arrays:
  """Adds a batch axis and a head axis, both of length 1, to the arrays.

  The compiled program takes and returns arrays without these axes; with them, XLA would copy the
  arrays to change their layout.
  """
  return {
    name: x[None, :, None] if name in ("q", "k", "v") else x[..., None, :]
    for name, x in arrays.items()
  }


if __name__ == "__main__":
  launcher.launch("attention", main)
