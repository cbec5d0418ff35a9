"""Evaluates the model of a run of any experiment on a file, and prints its bits per byte.

python -m experiments.evaluate --workdir=runs/quickstart --file=README.md
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from absl import flags

from experiments import evaluation, launcher, open_run, shared_flags

shared_flags.define_run_flags()
shared_flags.define_weights_flag()
shared_flags.define_evaluation_flags()
flags.DEFINE_alias("rows", "eval_rows")  # an earlier name
_FILE = flags.DEFINE_string(
  "file",
  None,
  "File to evaluate: a text. For a model of images: a picture, or the raw bytes (RGB) of one or "
  "more images, of the same size as the images that the model was trained on.",
  required=True,
)


def main() -> None:
  """Prints the bits per byte of --file."""
  options = shared_flags.read_group(shared_flags.EvalFlags)
  run = open_run.open_run(flags.FLAGS.workdir, weights=options.weights)
  print(evaluation.evaluate_file(run, _FILE.value, options))


if __name__ == "__main__":
  launcher.launch("evaluate", main)
