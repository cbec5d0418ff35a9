"""Starts a command of one of the experiments: enwik8, pg19, imagenet64 and text.

Every field of the model's and the training's configuration is a flag, such as --config.d_model=512
or --config.lr_max=1e-3; `run_flags` defines the others.
"""

from __future__ import annotations

import functools
import sys
import types

from absl import flags

from experiments import commands, config_flags, launcher, run_flags, run_setup, specs
from tvq_haiku.parallel import multihost

_COMMANDS = {
  "train": commands.train,
  "validation": commands.evaluate,
  "test": commands.evaluate,
  "sample": commands.sample,
  "train_vocab": commands.train_vocab,
  "export": commands.export_params,
  "info": commands.info,
}


def launch(spec: specs.ExperimentSpec) -> None:
  """Parses the flags and runs the command of --command on the experiment `spec`."""
  config_flags.define_flags(spec.presets)
  _list_in_help(config_flags, run_flags)
  launcher.launch(spec.name, functools.partial(_main, spec))


def _main(spec: specs.ExperimentSpec) -> None:
  """Reads the flags, joins the other processes if there are any, and runs the command."""
  given = run_flags.read_flags()
  _check_device_flags(given.command, given.devices)
  if given.devices.multihost:
    multihost.initialize(given.devices.coordinator, given.devices.n_process, given.devices.process)
  _COMMANDS[given.command](run_setup.make_setup(spec, given))


def _check_device_flags(command: str, devices: run_flags.DeviceFlags) -> None:
  """Raises a ValidationError if the device flags contradict the command or each other."""
  if (command != "train" and devices.multihost) or (
    command not in ("train", "info") and devices.mesh
  ):
    raise flags.ValidationError(
      f"--command={command} uses one device: --mesh and --multihost are for training."
    )
  addresses = (devices.coordinator, devices.n_process, devices.process)
  if not devices.multihost and any(value is not None for value in addresses):
    raise flags.ValidationError("--coordinator, --n_process and --process need --multihost.")


def _list_in_help(*modules: types.ModuleType) -> None:
  """Lists the flags of `modules` in --help, which by default lists those of the main module."""
  for module in modules:
    for flag in flags.FLAGS.get_key_flags_for_module(module):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
