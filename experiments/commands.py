"""Runs one command of an experiment; each function is one value of --command."""

from __future__ import annotations

from experiments import (
  command_line,
  initialization,
  model_size,
  open_run,
  run_setup,
  sampling,
)
from experiments.run_setup import Configs, RunSetup
import tvq_haiku as tvq
from tvq_haiku.checkpoint import checkpoints, run_directory
from tvq_haiku.data.sources import base
from tvq_haiku.evaluation import memory_plan
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import (
  best_checkpoint,
  data_statistics,
  measures,
  run_record,
  summary,
  trainer,
)
from tvq_haiku.run import commands as run_commands
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.types import Params
from tvq_haiku.utils import progress


def train(setup: RunSetup) -> None:
  """Trains the model, or resumes its training, and prints the commands to run next."""
  experiment = run_setup.make_experiment(setup, run_setup.resolve_configs(setup))
  train_flags = setup.flags.train
  if multihost.is_main_process():
    model_size.log_size(setup, experiment)
  run = run_commands.train(
    experiment,
    params=_initial_params(setup, experiment),
    validate_tokens=train_flags.validate_tokens,
    tensorboard=train_flags.tensorboard,
    wandb=train_flags.wandb,
    options=trainer.TrainerOptions(
      log_every=train_flags.log_every,
      validate_every=train_flags.validate_every,
      save_seconds=train_flags.save_seconds,
      max_to_keep=train_flags.keep,
      max_skipped=train_flags.max_skipped,
      debug_nans=train_flags.debug_nans,
    ),
  )
  if multihost.is_main_process():
    print(_describe_result(experiment, run, is_multihost=setup.flags.devices.multihost))


def evaluate(setup: RunSetup) -> None:
  """Evaluates a checkpoint on the split that --command names, and prints the metrics."""
  split = setup.flags.command
  run = _load_run(setup)
  experiment = run_setup.make_experiment(setup, Configs(run.config, run.train_cfg))
  weights = setup.flags.evaluation.weights
  metrics, file = run_commands.evaluate(experiment, run, split, weights=weights)
  values = ", ".join(
    f"{name} {measures.format_value(metrics[name])}" for name in experiment.measures
  )
  print(
    f"{split}: {values}, loss_lm {metrics['loss_lm']:.4f} nats per token; "
    f"{metrics['tokens']:,} tokens ({metrics['bytes']:,} bytes), after {metrics['step']} updates\n"
    f"Written to {file}"
  )


def sample(setup: RunSetup) -> None:
  """Samples text, or a grid of images, from a checkpoint."""
  vocabulary = None if setup.flags.vocab is None else run_setup.open_vocabulary(setup, None, 0)
  run = open_run.open_run(
    setup.workdir,
    weights=setup.flags.evaluation.weights,
    vocabulary=vocabulary,
    changes=setup.flags.model_changes,
  )
  if run.record.name is None:  # a run of an earlier version
    record = run_record.RunRecord(setup.spec.name, setup.preset.image_size, setup.spec.top_p)
    run = run._replace(record=record)
  sampling.sample(run, setup.flags.sampling, seed=setup.flags.seed)


def train_vocab(setup: RunSetup) -> None:
  """Trains a SentencePiece vocabulary on the training split."""
  configs = run_setup.resolve_configs(setup)
  run_setup.train_vocabulary(setup, run_setup.open_source(setup), configs.config.n_vocab)


def export_params(setup: RunSetup) -> None:
  """Writes the parameters and the configuration of a checkpoint to one file."""
  run = _load_run(setup)
  file = run_commands.export_params(setup.workdir, run)
  print(f"Wrote the parameters after {int(run.train_state.step)} updates to {file}")


def info(setup: RunSetup) -> None:
  """Prints the state of the run, its settings, the cost of the model, and statistics of the data.

  If there is no run yet, the settings are those of a new one.
  """
  configs, mesh = run_setup.resolve_configs(setup), setup.flags.devices.mesh
  is_run = run_directory.has_checkpoint(setup.workdir)
  if is_run:
    print(summary.describe_run(setup.workdir) + "\n")
  else:
    print(f"There is no run in {setup.workdir}. The settings of a new one:\n")
  print(summary.describe_model(*configs))
  if mesh:
    print("\n" + memory_plan.describe_plan(*configs, sharding.parse_mesh(mesh)))
  has_words = setup.preset.image_size is None
  if setup.flags.data_dir is None and (is_run or not setup.flags.smoke):
    statistics = data_statistics.load_statistics(setup.workdir)
    print("\nData of the run:" if statistics else "\nData: set --data_dir to see its statistics.")
    for split, values in statistics.items():
      print(summary.describe_data(split, values, has_words=has_words))
    return
  print("\nData:")
  if setup.vocab_file and not setup.vocab_file.exists():
    source = run_setup.open_source(setup)
    for split in base.SPLITS:
      print(f"  {split:<11}{source.n_byte(split):>15,} bytes")
    print(
      f"  To count the tokens, first train the vocabulary {setup.vocab_file} with "
      "--command=train_vocab."
    )
    return
  experiment = run_setup.make_experiment(setup, configs)
  for split in base.SPLITS:
    statistics = experiment.open_split(split).statistics
    print(summary.describe_data(split, statistics, has_words=has_words))


def _load_run(setup: RunSetup) -> tvq.Checkpoint:
  """Returns the checkpoint that --weights selects; --config flags change its configuration."""
  return checkpoints.load_run(
    setup.workdir, weights=setup.flags.evaluation.weights, changes=setup.flags.model_changes
  )


def _initial_params(setup: RunSetup, experiment: experiment_lib.Experiment) -> Params | None:
  """Returns the parameters that --init names, or None if the run does not start from them."""
  init = setup.flags.train.init
  if init is None:
    return None
  if run_directory.latest_step(experiment.workdir) is not None:
    progress.log(f"--init={init} is ignored: {experiment.workdir} holds a run, which is resumed")
    return None
  weights = setup.flags.evaluation.weights
  return initialization.load_params(init, experiment.config, weights=weights)


def _describe_result(
  experiment: experiment_lib.Experiment, run: tvq.Checkpoint, *, is_multihost: bool
) -> str:
  """Returns a message with the progress, the best validation loss and the commands to run next."""
  n_update, n_all = int(run.train_state.step), run.train_cfg.n_update
  resume = command_line.resume_command(multihost=is_multihost)
  if n_update < n_all:
    return f"Stopped after {n_update} of {n_all} updates and saved. To resume: {resume}"
  validations = best_checkpoint.read_validations(experiment.workdir)
  if validations.step < n_update:
    return (
      f"Trained for {n_update} updates; the last validation was interrupted. To repeat it: {resume}"
    )
  best = "All validation losses were non-finite."
  if validations.best_step >= 0:
    figure = measures.describe(validations.known_metrics, experiment.token_name)
    best = f"Best validation: {figure}, after {validations.best_step} updates."
  return (
    f"Trained for {n_update} updates. {best}\n"
    f"To test it: {command_line.other_command('test')}\n"
    f"To sample:  {command_line.other_command('sample')}"
  )
