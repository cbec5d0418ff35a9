"""The paths, the vocabulary and the configurations that the flags of a command select."""

import dataclasses
import pathlib

from absl import flags
import pytest

from experiments import enwik8, pg19, run_flags, run_setup, text
from tvq_haiku import data

DEFAULTS = run_flags.RunFlags(
  command="train",
  data_dir=None,
  workdir=None,
  cache_dir=None,
  size="paper",
  smoke=False,
  seed=0,
  vocab=None,
  vocab_bytes=1000,
  train=None,
  devices=None,
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


@pytest.mark.parametrize(
  "spec, changes, message",
  [
    (enwik8.SPEC, dict(smoke=True, data_dir="x"), "--smoke uses data of its own"),
    (enwik8.SPEC, dict(vocab="x.model"), "the tokens of enwik8 are bytes"),
    (text.SPEC, dict(command="train_vocab"), "no vocabulary to train"),
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
