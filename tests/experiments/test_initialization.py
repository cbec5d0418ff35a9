"""The model that a new run starts from: of a run, of its best checkpoint, or of a file."""

import jax
import pytest

from experiments import initialization
import tvq_haiku as tvq
from tvq_haiku.parallel import multihost

import helpers

CONFIG = helpers.RUN


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  """A run with a last and a best checkpoint, and with exported parameters of the last one."""
  directory = tmp_path_factory.mktemp("run")
  tvq.save_checkpoint(directory, helpers.make_checkpoint(4))
  tvq.save_checkpoint(directory / "best", helpers.make_checkpoint(2))
  tvq.export_params(helpers.random_params(CONFIG, 4), CONFIG, directory / "params.safetensors")
  tvq.LanguageModel(helpers.random_params(CONFIG, 4), CONFIG).save(directory / "saved")
  return directory


@pytest.mark.parametrize("name", [".", "best", "params.safetensors", "saved"])
def test_configuration_is_that_of_the_model(run_dir, name):
  assert initialization.read_config(str(run_dir / name)) == CONFIG


@pytest.mark.parametrize(
  "name, weights, step, origin",
  [
    (".", "best", 2, ", after 2 updates"),
    (".", "last", 4, ", after 4 updates"),
    ("best", "best", 2, ", after 2 updates"),
    ("params.safetensors", "best", 4, ""),
    ("saved", "best", 4, ""),
  ],
)
def test_parameters_are_loaded_and_a_line_says_so(run_dir, capsys, name, weights, step, origin):
  init = str(run_dir / name)
  params = initialization.load_params(init, CONFIG, weights=weights)
  helpers.assert_same(params, helpers.random_params(CONFIG, step))
  n_param = sum(x.size for leaves in params.values() for x in leaves.values())
  assert capsys.readouterr().err == (
    f"starting from {init}{origin}: {n_param:,} parameters and the configuration of the model\n"
  )


def test_changed_settings_are_named(run_dir, capsys):
  config = CONFIG.replace(p_dropres=0.3)
  initialization.load_params(str(run_dir), config, weights="best")
  assert "model, with p_dropres=0.3 instead of 0.1\n" in capsys.readouterr().err


def test_parameters_that_do_not_fit_are_refused(run_dir):
  with pytest.raises(ValueError, match=r"^--init=.*params do not fit this config"):
    initialization.load_params(str(run_dir), CONFIG.replace(d_model=32), weights="best")


def test_parameters_can_be_put_on_a_mesh(run_dir):
  params = initialization.load_params(str(run_dir), CONFIG, weights="best")
  state = tvq.init_train_state(
    CONFIG, helpers.RUN_TRAINING, jax.random.key(0), params, mesh="fsdp:2"
  )
  helpers.assert_same(state.params, params)


def test_several_processes_need_a_file(run_dir, monkeypatch):
  monkeypatch.setattr(multihost, "is_single_process", lambda: False)
  with pytest.raises(ValueError, match="several processes can only start from a file"):
    initialization.load_params(str(run_dir), CONFIG, weights="best")
  initialization.load_params(str(run_dir / "params.safetensors"), CONFIG, weights="best")


def test_vocabulary_of_bytes_has_no_file(run_dir):
  for name in (".", "best", "params.safetensors", "saved"):
    assert initialization.find_vocabulary(str(run_dir / name)) is None


def test_vocabulary_of_pieces_is_in_the_directory_of_the_run(tmp_path):
  config = CONFIG.replace(n_vocab=300)
  tvq.export_params(helpers.random_params(config), config, tmp_path / "params.safetensors")
  init = str(tmp_path / "params.safetensors")
  with pytest.raises(ValueError, match=r"^--init=.*n_vocab=300, but no vocab.model lies"):
    initialization.find_vocabulary(init)
  (tmp_path / "vocab.model").touch()
  assert initialization.find_vocabulary(init) == tmp_path / "vocab.model"


def test_vocabulary_of_a_best_checkpoint_is_in_the_directory_of_its_run(run_dir, tmp_path):
  for directory in (tmp_path, tmp_path / "best"):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text((run_dir / "config.json").read_text())
  (tmp_path / "vocab.model").touch()
  for directory in (tmp_path, tmp_path / "best"):
    assert initialization.find_vocabulary(str(directory)) == tmp_path / "vocab.model"


def test_other_paths_are_refused(tmp_path):
  (tmp_path / "text").write_text("It is a truth universally acknowledged")
  for name, message in [
    ("nowhere", "it does not exist. Expected: the directory of a run, or a file"),
    (".", "holds no checkpoint"),
    ("text", "text does not hold the parameters of a model"),
  ]:
    with pytest.raises(ValueError, match=f"^--init={tmp_path / name}: .*{message}"):
      initialization.read_config(str(tmp_path / name))
