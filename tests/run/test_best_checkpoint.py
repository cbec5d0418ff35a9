"""The best checkpoint and validation.json, also after the process has died between both."""

import math

import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import run_directory
from tvq_haiku.run import best_checkpoint

import helpers
from helpers import assert_same

pytestmark = pytest.mark.slow


def test_checkpoint_of_the_lowest_loss_is_kept(tmp_path):
  checkpoints = {step: helpers.make_checkpoint(step) for step in (2, 4, 6)}
  is_best = [
    best_checkpoint.keep_best(tmp_path, checkpoints[step], {"loss_lm": loss, "bits": step})
    for step, loss in ((2, 3.0), (4, 2.0), (6, 2.5))
  ]
  assert is_best == [True, True, False]
  assert best_checkpoint.read_validations(tmp_path)[:3] == (6, 4, 2.0)
  assert best_checkpoint.read_validations(tmp_path).best_metrics == {"loss_lm": 2.0, "bits": 4}
  assert run_directory.saved_steps(tmp_path / "best") == [4]
  assert_same(tvq.load_checkpoint(tmp_path / "best").train_state, checkpoints[4].train_state)


def test_run_without_validation_has_no_best(tmp_path):
  assert best_checkpoint.read_validations(tmp_path)[:3] == (-1, -1, math.inf)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_non_finite_loss_is_never_the_best(tmp_path, loss):
  assert not best_checkpoint.keep_best(tmp_path, helpers.make_checkpoint(2), {"loss_lm": loss})
  assert best_checkpoint.read_validations(tmp_path)[:3] == (2, -1, math.inf)
  assert not (tmp_path / "best").exists()


def test_process_that_died_before_it_wrote_the_status_repeats_the_validation(tmp_path):
  checkpoint = helpers.make_checkpoint(4)
  assert best_checkpoint.keep_best(tmp_path, checkpoint, {"loss_lm": 2.0})
  (tmp_path / "validation.json").unlink()
  assert best_checkpoint.keep_best(tmp_path, checkpoint, {"loss_lm": 2.0})
  assert best_checkpoint.read_validations(tmp_path)[:3] == (4, 4, 2.0)


def test_run_resumed_from_an_older_checkpoint_replaces_a_later_best(tmp_path):
  for step, loss in ((8, 2.0), (4, 1.0)):
    assert best_checkpoint.keep_best(tmp_path, helpers.make_checkpoint(step), {"loss_lm": loss})
    assert run_directory.saved_steps(tmp_path / "best") == [step]
    assert best_checkpoint.read_validations(tmp_path).best_step == step


def test_status_without_metrics_is_read(tmp_path):
  """Earlier versions recorded the loss alone."""
  text = '{"step": 6, "best_step": 4, "best_loss": 2.0}'
  (tmp_path / "validation.json").write_text(text)
  assert best_checkpoint.read_validations(tmp_path) == (6, 4, 2.0, {})


@pytest.mark.parametrize("text", ["{", "[]", '{"epoch": 1}'])
def test_damaged_status_is_named(tmp_path, text):
  (tmp_path / "validation.json").write_text(text)
  with pytest.raises(tvq.CheckpointError, match=r"validation\.json is damaged: .*To forget"):
    best_checkpoint.read_validations(tmp_path)
