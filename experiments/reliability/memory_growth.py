"""Measures the memory growth of a long training run.

  python -m experiments.reliability.memory_growth --updates=4000

The run writes checkpoints, log records and event files, and is validated. The command prints the
resident memory of the process after every tenth of the run, and the slope of a least-squares line
through the second half.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from collections.abc import Mapping
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

_SAVE_SECONDS = flags.DEFINE_float(
  "save_seconds", 2.0, "Minimum time between two checkpoints, in seconds."
)
_UPDATES = flags.DEFINE_integer("updates", 4000, "Number of updates of the run.", lower_bound=100)

_LOG_EVERY = 10  # updates


class MemoryRecorder:
  """Passes metrics on to other writers, and records the memory at each call."""

  def __init__(self, record: metric_writers.RecordMetrics):
    self._record = record
    self.steps: list[int] = []
    self.megabytes: list[float] = []

  def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records the metrics and the resident memory after `step` updates."""
    self._record(step, metrics)
    self.steps.append(step)
    self.megabytes.append(_resident_megabytes())


def main() -> None:
  """Trains, and prints the memory and its slope."""
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    with metric_writers.open_writers(directory / "run", tensorboard=True) as writers:
      recorder = MemoryRecorder(writers.write)
      _train(_make_experiment(directory, _UPDATES.value), recorder, _SAVE_SECONDS.value)
  steps, megabytes = np.array(recorder.steps), np.array(recorder.megabytes)
  for i in range(0, len(steps), max(len(steps) // 10, 1)):
    print(f"update {steps[i]:>7,}  {megabytes[i]:8.1f} MB")
  half = len(steps) // 2
  slope = np.polyfit(steps[half:], megabytes[half:], 1)[0]
  print(f"slope over the second half: {1000 * slope:.2f} MB per 1,000 updates")


def _make_experiment(directory: pathlib.Path, n_update: int) -> experiment_lib.Experiment:
  """Returns a tiny text experiment in `directory`."""
  return experiment_lib.Experiment(
    source=data.TextFiles(toy_datasets.write_text(directory, n_byte=200_000)),
    vocabulary=data.ByteVocabulary,
    config=tvq.TransformerConfig.tiny(n_layer=1, remat="none"),
    train_cfg=tvq.TrainConfig(
      lr_max=4e-3,
      n_warmup_step=5,
      n_max_step=n_update,
      sequence_len=64,
      update_len=64,
      global_batch_size=4,
    ),
    workdir=directory / "run",
    cache_dir=directory / "cache",
    measures=("bits_per_byte",),
    token_name="byte",
  )


def _train(
  experiment: experiment_lib.Experiment, recorder: MemoryRecorder, save_seconds: float
) -> None:
  """Trains with eight validations.

  Args:
    experiment: the experiment.
    recorder: receives the metrics of the run.
    save_seconds: minimum time between two checkpoints.
  """
  config, train_cfg = experiment.config, experiment.train_cfg
  batches = data.PackedBatches(
    experiment.open_split("train").stream,
    batch_size=train_cfg.global_batch_size,
    sequence_len=train_cfg.sequence_len,
  )
  validation = experiment.open_split("validation")
  trainer.fit(
    config,
    train_cfg,
    batches,
    experiment.workdir,
    record=recorder,
    validate=lambda params, stop: experiment.measure_split(params, config, validation, stop=stop),
    options=trainer.TrainerOptions(
      log_every=_LOG_EVERY,
      save_seconds=save_seconds,
      validate_every=train_cfg.n_max_step // 8,
    ),
  )


def _resident_megabytes() -> float:
  """Returns the resident memory of this process."""
  pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
  launcher.launch("memory_growth", main)
