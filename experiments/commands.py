"""Runs one command of an experiment; each function is one value of --command."""

from __future__ import annotations

import math
import os

import jax

from experiments import command_line, run_setup
from experiments.run_setup import Configs, RunSetup
import tvq_haiku as tvq
from tvq_haiku.checkpoint import checkpoints, export, run_directory
from tvq_haiku.data.sources import base
from tvq_haiku.evaluation import memory_plan
from tvq_haiku.model import remat as remat_lib
from tvq_haiku.model import transformer
from tvq_haiku.parallel import multihost, sharding
from tvq_haiku.run import best_checkpoint, summary, trainer
from tvq_haiku.run import commands as run_commands
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.types import Params
from tvq_haiku.utils import progress


def train(setup: RunSetup) -> None:
  """Trains the model, or resumes its training, and prints the commands to run next."""
  experiment = run_setup.make_experiment(setup, run_setup.resolve_configs(setup))
  train_flags = setup.flags.train
  _warn_about_memory(experiment)
  run = run_commands.train(
    experiment,
    params=_initial_params(experiment, train_flags.init),
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
  metrics = run_commands.evaluate(experiment, run, split)
  values = ", ".join(f"{name} {_format(metrics[name])}" for name in experiment.measures)
  print(
    f"{split}: {values}, loss_lm {metrics['loss_lm']:.4f} nats per token; "
    f"{metrics['tokens']:,} tokens ({metrics['bytes']:,} bytes), after {metrics['step']} updates"
  )


def sample(setup: RunSetup) -> None:
  """Samples text, or a grid of images, from a checkpoint."""
  run, sampling = _load_run(setup), setup.flags.sampling
  experiment = run_setup.make_experiment(setup, Configs(run.config, run.train_cfg))
  top_p = setup.spec.top_p if sampling.top_p is None else sampling.top_p
  settings = dict(temperature=sampling.temperature, top_p=top_p)
  if experiment.image_size:
    file = run_commands.sample_images(experiment, run, sampling.images, **settings)
  else:
    # Restores the bytes that were typed; they need not be valid UTF-8.
    prompts = [os.fsencode(prompt) for prompt in sampling.prompt]
    texts, file = run_commands.sample_texts(
      experiment, run, prompts, max_new_tokens=sampling.length, **settings
    )
    print("\n\n".join(texts))
  print(f"Written to {file}")


def train_vocab(setup: RunSetup) -> None:
  """Trains a SentencePiece vocabulary on the training split."""
  configs = run_setup.resolve_configs(setup)
  run_setup.train_vocabulary(setup, run_setup.open_source(setup), configs.config.n_vocab)


def export_params(setup: RunSetup) -> None:
  """Writes the parameters and the configuration of a checkpoint to one file."""
  run = _load_run(setup)
  file = setup.workdir / export.PARAMS_FILE
  export.export_params(run.train_state.params, run.config, file)
  print(f"Wrote the parameters after {int(run.train_state.step)} updates to {file}")


def info(setup: RunSetup) -> None:
  """Prints the configuration, the size and the cost of the model, and statistics of the data."""
  configs, mesh = run_setup.resolve_configs(setup), setup.flags.devices.mesh
  print(summary.describe_model(*configs))
  if mesh:
    print("\n" + memory_plan.describe_plan(*configs, sharding.parse_mesh(mesh)))
  if setup.flags.data_dir is None and not setup.flags.smoke:
    print("\nData: set --data_dir to see its statistics.")
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
    print(summary.describe_data(split, statistics, has_words=experiment.image_size is None))


def _load_run(setup: RunSetup) -> tvq.Checkpoint:
  """Returns the checkpoint that --weights selects; --config flags change its configuration."""
  return checkpoints.load_run(
    setup.workdir, weights=setup.flags.evaluation.weights, changes=setup.flags.model_changes
  )


def _warn_about_memory(experiment: experiment_lib.Experiment) -> None:
  """Logs a warning if the training probably needs more memory than the device has."""
  axes = dict(experiment.mesh.shape) if experiment.mesh else None
  plan = memory_plan.plan_memory(experiment.config, experiment.train_cfg, axes)
  needed = sum(plan.memory.values())
  available = remat_lib.device_memory_bytes(jax.devices()[0])
  if needed > available:
    progress.log(
      f"warning: training needs about {needed / 1e9:,.0f} GB of memory per device, but only "
      f"{available / 1e9:,.0f} GB are available; --size=cpu selects a small model"
    )


def _initial_params(experiment: experiment_lib.Experiment, init: str | None) -> Params | None:
  """Returns the parameters of the file `init`, or None if the run does not start from them."""
  if init is None:
    return None
  if run_directory.latest_step(experiment.workdir) is not None:
    progress.log(f"--init={init} is ignored: {experiment.workdir} holds a run, which is resumed")
    return None
  try:
    params, _ = export.import_params(init)
    transformer.check_params(params, experiment.config)
  except (OSError, ValueError) as error:
    raise ValueError(f"--init={init}: {error}") from error
  return params


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
    bits = validations.best_loss / math.log(2)
    best = (
      f"Best validation loss: {bits:.4f} bits per {experiment.token_name}, after "
      f"{validations.best_step} updates."
    )
  return (
    f"Trained for {n_update} updates. {best}\n"
    f"To test it: {command_line.other_command('test')}\n"
    f"To sample:  {command_line.other_command('sample')}"
  )


def _format(value: float) -> str:
  return f"{value:.4f}" if value < 1e5 else f"{value:.3g}"
