"""Messages about the size of a model before it is trained."""

from __future__ import annotations

import jax

from experiments import specs
from experiments.run_setup import RunSetup
from tvq_haiku.evaluation import memory_plan
from tvq_haiku.model import remat as remat_lib
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.run import summary
from tvq_haiku.utils import progress


def log_size(setup: RunSetup, experiment: experiment_lib.Experiment) -> None:
  """Logs the size of the model if it is a small default, and a warning if it needs too much memory.

  Args:
    setup: the command's setup.
    experiment: the experiment to train.
  """
  axes = dict(experiment.mesh.shape) if experiment.mesh else None
  plan = memory_plan.plan_memory(experiment.config, experiment.train_cfg, axes)
  needed = sum(plan.memory.values()) / 1e9
  available = remat_lib.device_memory_bytes(jax.devices()[0]) / 1e9
  run_flags, spec, paper = setup.flags, setup.spec, specs.SIZES[0]
  is_implied = run_flags.size is None and not run_flags.smoke and run_flags.train.init is None
  if is_implied and spec.default_size != paper:
    n_param = summary.count_params(experiment.config)
    n_paper = summary.count_params(spec.presets[paper].config)
    progress.log(
      f"--size={spec.default_size} by default: {n_param:,} parameters; training needs about "
      f"{needed:,.2f} of {available:,.0f} GB of memory. --size={paper} selects the paper's model, "
      f"with {n_paper:,} parameters"
    )
  if needed > available:
    progress.log(
      f"warning: training needs about {needed:,.0f} GB of memory per device, but only "
      f"{available:,.0f} GB are available; --size=cpu selects a small model"
    )
