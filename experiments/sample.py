"""Samples text or images from the model of a run of any experiment.

python -m experiments.sample --workdir=runs/quickstart --prompt='The Admiral '
python -m experiments.sample --workdir=runs/quickstart --prompt='The Admiral ' --stream
python -m experiments.sample --workdir=runs/quickstart --interactive
python -m experiments.sample --workdir=runs/imagenet64 --images=9
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from absl import flags

from experiments import launcher, open_run, sampling, shared_flags

shared_flags.define_run_flags()
shared_flags.define_weights_flag()
shared_flags.define_sampling_flags()
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)


def main() -> None:
  """Samples from the run in --workdir."""
  run = open_run.open_run(flags.FLAGS.workdir, weights=flags.FLAGS.weights)
  options = shared_flags.read_group(shared_flags.SampleFlags)
  sampling.sample(run, options, seed=_SEED.value)


if __name__ == "__main__":
  launcher.launch("sample", main)
