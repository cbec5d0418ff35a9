import pytest

from tvq_haiku.run import commands

import small_experiments


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
  """A trained experiment of each kind, with its last checkpoint."""
  directory = tmp_path_factory.mktemp("runs")
  trained = {}
  for kind in small_experiments.KINDS:
    experiment = small_experiments.make_experiment(directory, kind)
    trained[kind] = (
      experiment,
      commands.train(experiment, options=small_experiments.OPTIONS, tensorboard=False),
    )
  return trained
