"""How fast one attention is, forward and backward, and how much memory it needs in between.

  python -m experiments.benchmarks.attention --seq_lens=8192

Rows are `vq_attention` with each reduction, keeping scores or computing them again, and quadratic
attention. Last comes what keeping every block's cache would cost: R·S·V numbers.
"""

from __future__ import annotations

import pathlib

from absl import flags
import jax
import jax.numpy as jnp

from experiments import launcher
from experiments.benchmarks import measure
import tvq_haiku as tvq
from tvq_haiku.attention import full
from tvq_haiku.attention import state as state_lib
from tvq_haiku.utils import files

_SEQ_LENS = flags.DEFINE_list("seq_lens", ["8192"], "T.")
_REDUCTIONS = flags.DEFINE_list("reductions", ["scan", "serial", "matmul", "assoc_scan"], "Which.")
_FULL = flags.DEFINE_boolean("full", True, "Also quadratic attention.")
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Calls of each case.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Where to write the rows; none: nowhere.")
_SMOKE = flags.DEFINE_boolean("smoke", False, "Tiny, once: the path, not the result.")

_NAMES = ("T", "model", "reduction", "remat")


def main() -> None:
  if _JSON.value:  # before the work, not after it
    files.prepare_directory(pathlib.Path(_JSON.value).parent)
  K, V, S, M = (4, 8, 8, 8) if _SMOKE.value else (64, 512, 256, 256)
  lengths = (
    [64] if _SMOKE.value else [launcher.parse_positive("seq_lens", x) for x in _SEQ_LENS.value]
  )
  cases = []
  for length in lengths:
    cases += [
      _quantized(length, K, V, S, M, reduction, remat)
      for reduction in _REDUCTIONS.value
      for remat in (False, True)
    ]
    if _FULL.value:
      cases.append(_full(length, K, V))
  rows = measure.compare(
    cases, rounds=1 if _SMOKE.value else _ROUNDS.value, peak_size=64 if _SMOKE.value else None
  )
  measure.print_table(rows, _NAMES)
  for length in lengths:
    print(
      f"T={length}: the caches of all blocks (R·S·V numbers) are {4e-6 * (length // M) * S * V:.1f} MB"
    )
  if _JSON.value:
    measure.write_json(_JSON.value, rows, benchmark="attention", K=K, V=V, S=S, M=M, L=M)


def _case(settings, attend, arrays, length: int, multiply_adds: int) -> measure.Case:
  """Value and gradients with respect to `arrays`, from a given gradient of the output."""
  weight = jax.random.normal(jax.random.key(9), arrays["v"].shape)

  def value_and_gradients(arrays, weight):
    values, transpose = jax.vjp(attend, arrays)
    return values, transpose(weight)

  program, seconds, temp = measure.compiled(value_and_gradients, arrays, weight)
  return measure.Case(
    " ".join(map(str, settings.values())),
    settings,
    lambda: program(arrays, weight),
    length,
    6.0 * multiply_adds,
    seconds,
    temp,
  )


def _arrays(length: int, K: int, V: int, reach: int) -> dict[str, jax.Array]:
  shapes = dict(
    q=(length, K),
    k=(length, K),
    v=(length, V),
    relative_keys=(reach + 1, K),
    content_bias=(K,),
    position_bias=(K,),
  )
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}


def _with_heads(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """One row of one head. Without the axes of length 1 outside, nothing is copied for their layout."""
  return {
    name: x[None, :, None] if name in ("q", "k", "v") else x[..., None, :]
    for name, x in arrays.items()
  }


def _quantized(
  length: int, K: int, V: int, S: int, M: int, reduction: str, remat: bool
) -> measure.Case:
  codebook = jax.random.normal(jax.random.key(1), (1, S, K))

  def attend(arrays):
    return tvq.vq_attention(
      **_with_heads(arrays),
      codebook=codebook,
      mem_len=M,
      block_len=M,
      reduction=reduction,
      remat=remat,
    ).values.reshape(length, V)

  settings = dict(T=length, model="vq", reduction=reduction, remat="block" if remat else "none")
  madds = length * (S * K + (2 * M + S + M + 1) * K + (2 * M + S) * V)
  return _case(settings, attend, _arrays(length, K, V, M), length, madds)


def _full(length: int, K: int, V: int) -> measure.Case:
  state = state_lib.initial_key_value_state(
    batch_size=1, n_kv_head=1, mem_len=length, d_k=K, d_v=V, dtype=jnp.float32
  )

  def attend(arrays):
    return full.full_attention(**_with_heads(arrays), state=state).values.reshape(length, V)

  settings = dict(T=length, model="full", reduction="-", remat="tiles")
  return _case(
    settings,
    attend,
    _arrays(length, K, V, length),
    length,
    length * (length + 1) // 2 * (2 * K + V),
  )


if __name__ == "__main__":
  launcher.launch("attention", main)
