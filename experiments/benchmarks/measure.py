"""Measures compiled programs in alternation, and compares their speed with the machine's peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.types import ArrayTree
from tvq_haiku.utils import files


class Compiled(NamedTuple):
  """A compiled program, its compilation time and its temporary memory."""

  program: Callable[..., ArrayTree]
  seconds: float  # to compile
  temp_bytes: int  # temporary memory of one call, as reported by the compiler


class Case(NamedTuple):
  """A program to measure."""

  name: str  # unique among the cases that are compared
  settings: dict[str, Any]  # columns of the table that describe the program
  run: Callable[[], ArrayTree]  # makes one call and returns arrays to wait for
  n_token: int  # tokens that one call processes
  model_flops: float  # FLOPs of one call
  compile_seconds: float
  temp_bytes: int  # temporary memory of one call, as reported by the compiler


def compile_program(
  function: Callable[..., ArrayTree], *args: ArrayTree, **jit_settings: Any
) -> Compiled:
  """Compiles `function` for the shapes of `args`.

  Args:
    function: a function of arrays.
    *args: its arguments.
    **jit_settings: arguments of `jax.jit`, such as `donate_argnums`.

  Returns:
    The program, the time to compile it, and its temporary memory.
  """
  start = time.perf_counter()
  program = jax.jit(function, **jit_settings).lower(*args).compile()
  seconds = time.perf_counter() - start
  return Compiled(program, seconds, program.memory_analysis().temp_size_in_bytes)


def matmul_peak(dtype: jnp.dtype, *, size: int | None = None) -> Case:
  """Returns a product of two square matrices, whose speed is taken as the machine's peak speed.

  Args:
    dtype: data type of the matrices.
    size: number of rows and columns. None: 2048 on a CPU, else 8192.
  """
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  x = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = compile_program(jnp.matmul, x, x)
  return Case(
    name="peak",
    settings={},
    run=lambda: product.program(x, x),
    n_token=0,
    model_flops=2.0 * size**3,
    compile_seconds=product.seconds,
    temp_bytes=product.temp_bytes,
  )


def compare(
  cases: Sequence[Case],
  *,
  rounds: int,
  dtype: jnp.dtype = jnp.float32,
  peak_size: int | None = None,
) -> list[dict[str, Any]]:
  """Measures all cases in alternation.

  A square product, which measures the peak speed, runs before each call.

  Args:
    cases: the programs.
    rounds: number of measured calls of each program.
    dtype: data type of the square product.
    peak_size: number of rows and columns of the square product. None: the default of `matmul_peak`.

  Returns:
    One row per case: its settings, the median and the shortest time of a call in seconds, tokens
    per second, FLOPs, the fraction of the peak speed, memory and compilation time.
  """
  peak = matmul_peak(dtype, size=peak_size)
  for case in (peak, *cases):
    jax.block_until_ready(case.run())
  times: dict[str, list[float]] = {case.name: [] for case in (peak, *cases)}
  for _ in range(rounds):
    for case in cases:
      times[peak.name].append(time_call(peak.run))
      times[case.name].append(time_call(case.run))
  peak_flops = peak.model_flops / statistics.median(times[peak.name])
  return [_make_row(case, times[case.name], peak_flops) for case in cases]


def _make_row(case: Case, times: Sequence[float], peak_flops: float) -> dict[str, Any]:
  """Returns the row of one case.

  Args:
    case: the program.
    times: the duration of each call, in seconds.
    peak_flops: peak speed of the machine, in FLOP/s.
  """
  seconds = statistics.median(times)
  return dict(
    case.settings,
    seconds=seconds,
    fastest=min(times),
    rounds=len(times),
    tokens_per_second=case.n_token / seconds,
    model_flops=case.model_flops,
    of_peak=case.model_flops / seconds / peak_flops,
    peak_gflops=peak_flops / 1e9,
    temp_mbytes=case.temp_bytes / 1e6,
    compile_seconds=case.compile_seconds,
  )


def time_call(run: Callable[[], ArrayTree]) -> float:
  """Returns the time in seconds until the results of one call of `run` are ready."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def print_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
  """Prints one line per row: the settings `names`, then the measurements."""
  titles = [*names, "tokens/s", "ms", "of peak", "temp MB", "compile s"]
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
  widths = [max(len(line[i]) for line in [titles, *lines]) for i in range(len(titles))]
  for line in [titles, *lines]:
    print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def write_json(
  file: str | pathlib.Path, rows: Sequence[Mapping[str, Any]], **metadata: Any
) -> None:
  """Writes the rows and a description of the machine to a JSON file.

  Args:
    file: the file to write.
    rows: the measurements.
    **metadata: further entries of the file.
  """
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
  text = json.dumps(dict(machine=machine, **metadata, rows=list(rows)), indent=1)
  files.write_atomically(pathlib.Path(file), text + "\n")
