"""The paths, the vocabulary and the configurations that the flags of a command select."""

import dataclasses
import pathlib
import re
import types

from absl import flags
import pytest

from experiments import commands, enwik8, imagenet64, pg19, run_flags, run_setup, text
from tvq_haiku import data
from tvq_haiku.checkpoint import run_directory

DEFAULTS = run_flags.RunFlags(
  command="train",
  data_dir=None,
  workdir=None,
  cache_dir=None,
  size=None,
  smoke=False,
  seed=0,
  vocab=None,
  vocab_bytes=1000,
  train=types.SimpleNamespace(init=None),
  devices=types.SimpleNamespace(mesh=None),
  evaluation=None,
  sampling=None,
  model_changes={},
  train_changes={},
)


def make(spec, **changes):
  """Returns the setup of a command with some flags."""
  return run_setup.make_setup(spec, dataclasses.replace(DEFAULTS, **changes))


@pytest.mark.parametrize(
  "changes, workdir, preset",
  [
    (dict(), "runs/enwik8", "paper"),
    (dict(size="cpu"), "runs/enwik8-cpu", "cpu"),
    (dict(smoke=True), "runs/enwik8-smoke", "smoke"),
    (dict(smoke=True, size="cpu", workdir="here"), "here", "smoke"),
  ],
)
def test_size_selects_preset_and_directory(changes, workdir, preset):
  setup = make(enwik8.SPEC, **changes)
  assert setup.workdir == pathlib.Path(workdir)
  assert setup.preset is enwik8.SPEC.presets[preset]
  assert setup.cache_dir == (setup.workdir / "cache" if preset == "smoke" else None)


def test_text_is_small_by_default_and_the_paper_s_experiments_are_not():
  assert make(text.SPEC, data_dir="x").preset is text.SPEC.presets["cpu"]
  assert make(text.SPEC, data_dir="x", size="paper").preset is text.SPEC.presets["paper"]
  for module in (enwik8, pg19, imagenet64):
    assert make(module.SPEC).preset is module.SPEC.presets["paper"]


@pytest.mark.parametrize("command", ["train", "test", "sample", "export", "info"])
def test_directory_of_a_text_run_contains_the_name_of_its_data(command):
  for changes, workdir in [
    (dict(data_dir="novels/Emma.txt"), "runs/text-Emma-cpu"),
    (dict(data_dir="novels/Emma.txt", size="paper"), "runs/text-Emma"),
    (dict(data_dir="novels/"), "runs/text-novels-cpu"),
    (dict(data_dir="novels/Emma.txt", workdir="here"), "here"),
    (dict(smoke=True), "runs/text-smoke"),
  ]:
    assert make(text.SPEC, command=command, **changes).workdir == pathlib.Path(workdir)


def test_commands_on_a_text_run_need_its_directory_or_its_data(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("text-Emma-cpu", "text-novels", "enwik8"):
    (tmp_path / "runs" / name).mkdir(parents=True)
  with pytest.raises(
    flags.ValidationError, match="sample needs a run: set --workdir, or set --data_dir"
  ) as e:
    make(text.SPEC, command="sample")
  assert str(e.value).endswith(" Existing runs: runs/text-Emma-cpu, runs/text-novels.")
  assert make(text.SPEC, command="info").workdir == pathlib.Path("runs/text-cpu")


def test_cache_directory_may_be_set():
  assert make(enwik8.SPEC, smoke=True, cache_dir="x").cache_dir == pathlib.Path("x")


def test_vocabulary_is_that_of_the_flag_or_of_the_run_or_the_default(tmp_path):
  workdir = str(tmp_path)
  assert make(text.SPEC, workdir=workdir).vocab_file is None
  assert make(pg19.SPEC, workdir=workdir).vocab_file == tmp_path / "vocab.model"
  assert make(pg19.SPEC, workdir=workdir, vocab="bytes").vocab_file is None
  assert make(text.SPEC, workdir=workdir, vocab="x.model").vocab_file == pathlib.Path("x.model")
  (tmp_path / "vocab.model").touch()
  assert make(text.SPEC, workdir=workdir).vocab_file == tmp_path / "vocab.model"


def write_run(directory, **changes):
  """Writes the configuration of a run, and a checkpoint without content."""
  config = text.SPEC.presets["smoke"].config.replace(**changes)
  (directory / "checkpoints" / "4").mkdir(parents=True)
  run_directory.write_config(directory, config, text.SPEC.presets["smoke"].train_cfg)
  return config


def test_initial_model_replaces_the_preset_and_its_vocabulary(tmp_path):
  config = write_run(tmp_path / "init", d_model=48, n_vocab=300)
  (tmp_path / "init" / "vocab.model").touch()
  init = types.SimpleNamespace(init=str(tmp_path / "init"))
  settings = dict(train=init, workdir=str(tmp_path / "new"), model_changes={"p_dropres": 0.1})
  for spec in (text.SPEC, pg19.SPEC):
    setup = make(spec, **settings)
    assert setup.vocab_file == tmp_path / "init" / "vocab.model"
    configs = run_setup.resolve_configs(setup)
    assert configs.config == config.replace(p_dropres=0.1)
    assert configs.train_cfg == setup.preset.train_cfg


def test_resumed_run_does_not_need_the_model_that_it_started_from(tmp_path):
  config = write_run(tmp_path / "run", d_model=48)
  init = types.SimpleNamespace(init=str(tmp_path / "removed"))
  setup = make(pg19.SPEC, train=init, workdir=str(tmp_path / "run"))
  assert setup.vocab_file is None  # the run has no vocab.model, so its tokens are bytes
  assert run_setup.resolve_configs(setup).config == config


def test_info_prints_the_state_and_the_settings_of_the_run(tmp_path, capsys):
  write_run(tmp_path, d_model=48)
  commands.info(make(text.SPEC, command="info", workdir=str(tmp_path)))
  out = capsys.readouterr().out
  assert f"{tmp_path}\n" in out and re.search(r"Updates: +4 of 20\n", out)
  assert re.search(r"d_model +48\n", out)
  commands.info(make(text.SPEC, command="info", workdir=str(tmp_path / "new")))
  assert capsys.readouterr().out.startswith(f"There is no run in {tmp_path / 'new'}. The settings")


def test_info_describes_the_run_with_changes(tmp_path):
  config = write_run(tmp_path, d_model=48)
  settings = dict(command="info", workdir=str(tmp_path), model_changes={"remat": "layer"})
  configs = run_setup.resolve_configs(make(text.SPEC, **settings))
  assert configs.config == config.replace(remat="layer")
  assert configs.train_cfg == text.SPEC.presets["smoke"].train_cfg


@pytest.mark.parametrize(
  "spec, changes, message",
  [
    (enwik8.SPEC, dict(smoke=True, data_dir="x"), "--smoke uses data of its own"),
    (enwik8.SPEC, dict(vocab="x.model"), "the tokens of enwik8 are bytes"),
    (text.SPEC, dict(command="train_vocab", data_dir="x"), "no vocabulary to train"),
  ],
)
def test_contradicting_flags_are_refused(spec, changes, message):
  with pytest.raises(flags.ValidationError, match=message):
    make(spec, **changes)


@pytest.mark.parametrize(
  "train_changes, n_warmup_step",
  [
    ({}, 100),
    ({"n_max_step": 30}, 3),
    ({"n_max_step": 90_000}, 100),
    ({"n_max_step": 30, "n_warmup_step": 7}, 7),
  ],
)
def test_shorter_training_has_a_shorter_warm_up(train_changes, n_warmup_step):
  setup = make(text.SPEC, size="cpu", train_changes=train_changes, model_changes={"n_layer": 3})
  config, train_cfg = run_setup.resolve_configs(setup)
  assert train_cfg.n_warmup_step == n_warmup_step
  assert config == text.SPEC.presets["cpu"].config.replace(n_layer=3)


def test_missing_vocabulary_is_trained_only_by_train_and_only_at_its_default_path(tmp_path):
  setup = make(pg19.SPEC, smoke=True, workdir=str(tmp_path))
  source = run_setup.open_source(setup)
  for changes in (dict(vocab=str(tmp_path / "vocab.model")), dict(command="test")):
    other = make(pg19.SPEC, smoke=True, workdir=str(tmp_path), **changes)
    with pytest.raises(ValueError, match=r"vocab\.model does not exist"):
      run_setup.open_vocabulary(other, source, 512)
  vocabulary = run_setup.open_vocabulary(setup, source, 512)
  assert isinstance(vocabulary, data.PieceVocabulary) and vocabulary.size == 512
  assert (tmp_path / "vocab.model").exists()
