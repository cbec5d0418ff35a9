"""Alternating medians of compiled programs, beside the machine's own speed of matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.utils import files


class Case(NamedTuple):
  """A program to measure."""

  name: str
  settings: dict[str, Any]  # what the row says of it
  run: Callable[[], Any]  # one call; returns arrays to wait for
  n_token: int  # read by one call
  model_flops: float  # of one call
  compile_seconds: float
  temp_bytes: int  # the compiled program's own count of temporary memory


def compiled(function: Callable[..., Any], *args: Any, **jit_settings: Any):
  """(compiled program, seconds it took, bytes of temporary memory)."""
  start = time.perf_counter()
  program = jax.jit(function, **jit_settings).lower(*args).compile()
  seconds = time.perf_counter() - start
  return program, seconds, program.memory_analysis().temp_size_in_bytes


def matmul_peak(dtype: jnp.dtype, *, size: int | None = None) -> Case:
  """A square product, in the dtype of the models: the yardstick of a row's `of peak`."""
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  program, seconds, temp = compiled(jnp.matmul, x, x)
  return Case("peak", {}, lambda: program(x, x), 0, 2.0 * size**3, seconds, temp)


def compare(
  cases: Sequence[Case],
  *,
  rounds: int,
  dtype: jnp.dtype = jnp.float32,
  peak_size: int | None = None,
) -> list[dict[str, Any]]:
  """Runs all cases in turn, `rounds` times, and returns a row for each.

  Speeds are medians. Each row's share of the peak is against the median of the square product,
  which takes its turn before every case.
  """
  peak = matmul_peak(dtype, size=peak_size)
  everything = [peak, *cases]
  for case in everything:
    jax.block_until_ready(case.run())
  times = {case.name: [] for case in everything}
  for _ in range(rounds):
    for case in cases:
      times[peak.name].append(_seconds(peak))
      times[case.name].append(_seconds(case))
  peak_flops = peak.model_flops / statistics.median(times[peak.name])
  rows = []
  for case in cases:
    seconds = statistics.median(times[case.name])
    rows.append(
      dict(
        case.settings,
        seconds=seconds,
        fastest=min(times[case.name]),
        rounds=rounds,
        tokens_per_second=case.n_token / seconds,
        model_flops=case.model_flops,
        of_peak=case.model_flops / seconds / peak_flops,
        peak_gflops=peak_flops / 1e9,
        temp_mbytes=case.temp_bytes / 1e6,
        compile_seconds=case.compile_seconds,
      )
    )
  return rows


def _seconds(case: Case) -> float:
  start = time.perf_counter()
  jax.block_until_ready(case.run())
  return time.perf_counter() - start


def print_table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
  """One line a row: the settings `names`, then what was measured."""
  heads = [*names, "tokens/s", "ms", "of peak", "temp MB", "compile s"]
  lines = [
    [
      *(str(row[name]) for name in names),
      f"{row['tokens_per_second']:,.0f}",
      f"{1e3 * row['seconds']:,.0f}",
      f"{row['of_peak']:.2f}",
      f"{row['temp_mbytes']:,.1f}",
      f"{row['compile_seconds']:.1f}",
    ]
    for row in rows
  ]
  widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
  for line in [heads, *lines]:
    print("  ".join(text.rjust(width) for text, width in zip(line, widths)))


def write_json(path: str | pathlib.Path, rows: Sequence[dict[str, Any]], **about: Any) -> None:
  """The rows, and the machine they were measured on."""
  device = jax.devices()[0]
  machine = dict(
    backend=jax.default_backend(),
    device=device.device_kind,
    devices=jax.device_count(),
    cores=os.cpu_count(),
    system=f"{platform.system()} {platform.machine()}",
    python=platform.python_version(),
    jax=jax.__version__,
  )
  text = json.dumps(dict(machine=machine, **about, rows=list(rows)), indent=1)
  files.write_atomically(pathlib.Path(path), text + "\n")
