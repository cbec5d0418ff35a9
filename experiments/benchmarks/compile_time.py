"""Measures the compilation time of a training step for different numbers of layers.

  python -m experiments.benchmarks.compile_time

The compiled program scans over the layers, so the time should not depend on their number.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

import statistics
import time

from absl import flags
import jax
import jax.numpy as jnp

from experiments import launcher
import tvq_haiku as tvq

_DEPTHS = flags.DEFINE_list(
  "depths", ["2", "24"], "Numbers of layers; times are also given relative to the first one."
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 3, "Number of compilations for each number of layers.", lower_bound=1
)
_SMOKE = flags.DEFINE_boolean(
  "smoke", False, "Compile a tiny model once, to check that the benchmark works."
)


def main() -> None:
  """Prints the median compilation time for each number of layers."""
  base_config = tvq.TransformerConfig.tiny() if _SMOKE.value else tvq.TransformerConfig(n_vocab=259)
  depths = [int(depth) for depth in _DEPTHS.value]
  times: dict[int, list[float]] = {depth: [] for depth in depths}
  for _ in range(1 if _SMOKE.value else _REPEATS.value):
    for depth in depths:
      times[depth].append(_seconds_to_compile(base_config.replace(n_layer=depth)))
  medians = {depth: statistics.median(times[depth]) for depth in depths}
  print("layers  seconds  times the first")
  for depth, median in medians.items():
    print(f"{depth:6d}  {median:7.2f}  {median / medians[depths[0]]:15.2f}")


def _seconds_to_compile(config: tvq.TransformerConfig) -> float:
  """Returns the time to trace and compile one training step of 512 tokens."""
  train_cfg = tvq.TrainConfig(sequence_len=512, update_len=512, global_batch_size=1)
  tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
  state = jax.eval_shape(lambda: tvq.init_train_state(config, train_cfg, jax.random.key(0)))
  step = tvq.make_train_step(config, train_cfg)
  jax.clear_caches()
  start = time.perf_counter()
  step.lower(state, {"inputs": tokens, "targets": tokens}, jax.random.key(0)).compile()
  return time.perf_counter() - start


if __name__ == "__main__":
  launcher.launch("compile_time", main)
