"""Memory of a long training run: what a step leaves behind.

  python -m experiments.reliability.memory_growth --updates=4000

Trains with everything on: checkpoints, validation, records, event files. Prints resident memory
every tenth of the run, and its slope over the second half, by least squares.
"""

from __future__ import annotations

import os
import pathlib
import tempfile

from absl import flags
import numpy as np

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.run import metric_writers, trainer

_SAVE_SECONDS = flags.DEFINE_float("save_seconds", 2.0, "Between two checkpoints.")
_UPDATES = flags.DEFINE_integer("updates", 4000, "Of the run.", lower_bound=100)


def main() -> None:
  with tempfile.TemporaryDirectory() as directory:
    place = pathlib.Path(directory)
    train_cfg = tvq.TrainConfig(
      lr_max=4e-3,
      n_warmup_step=5,
      n_max_step=_UPDATES.value,
      sequence_len=64,
      update_len=64,
      global_batch_size=4,
    )
    seen: list[tuple[int, float]] = []
    with metric_writers.open_writers(place / "run", tensorboard=True) as record:

      def watched(step, values):
        record(step, values)
        seen.append((step, _resident_mb()))

      e = experiment_lib.Experiment(
        source=data.TextFiles(toy_datasets.write_text(place, n_byte=200_000)),
        vocabulary=data.ByteVocabulary,
        config=tvq.TransformerConfig.tiny(n_layer=1, remat="none"),
        train_cfg=train_cfg,
        workdir=place / "run",
        cache_dir=place / "cache",
        measures=("bits_per_byte",),
        token_name="byte",
      )
      batches = data.PackedBatches(
        e.open_split("train").stream,
        batch_size=train_cfg.global_batch_size,
        sequence_len=train_cfg.sequence_len,
      )
      validation = e.open_split("validation")
      trainer.fit(
        e.config,
        train_cfg,
        batches,
        e.workdir,
        record=watched,
        log_every=10,
        save_seconds=_SAVE_SECONDS.value,
        validate_every=_UPDATES.value // 8,
        validate=lambda params, stop: e.likelihood(e.config, params, validation, stop=stop),
      )
    steps, memory = np.array(seen).T
    for i in range(0, len(seen), max(len(seen) // 10, 1)):
      print(f"update {int(steps[i]):>7,}  {memory[i]:8.1f} MB")
    half = len(seen) // 2
    slope = np.polyfit(steps[half:], memory[half:], 1)[0]
    print(f"slope over the second half: {1000 * slope:.2f} MB in 1,000 updates")


def _resident_mb() -> float:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
  launcher.launch("endurance", main)
