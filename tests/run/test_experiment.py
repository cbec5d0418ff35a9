"""The checks of an experiment, its metrics of a split, and the loading of its checkpoints."""

import dataclasses

import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.checkpoint import checkpoints
from tvq_haiku.run import metric_writers

from damage import damage
import helpers
from small_experiments import CONFIG

pytestmark = pytest.mark.slow


def test_encoders_and_models_of_features_are_rejected(runs):
  with pytest.raises(ValueError, match="causal=False: an encoder cannot predict"):
    dataclasses.replace(runs["text"][0], config=CONFIG.replace(causal=False))
  with pytest.raises(ValueError, match="no_emb=True: the model reads features"):
    dataclasses.replace(runs["text"][0], config=CONFIG.replace(no_emb=True))


def test_vocabulary_of_another_size_is_rejected(runs):
  with pytest.raises(ValueError, match=r"n_vocab=330, .*259"):
    dataclasses.replace(runs["text"][0], config=CONFIG.replace(n_vocab=330))


def test_sequences_that_split_images_are_rejected(runs):
  message = "sequence_len=48 must be a multiple of 192, the number of tokens per image"
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(runs["images"][0], image_size=8)


def test_sequences_start_at_images(runs):
  assert runs["images"][0].align == 3 * 4 * 4 and runs["text"][0].align == 1


@pytest.mark.parametrize("max_tokens, n", [(100, 96), (96, 96), (10, 48)])
def test_limited_validation_reads_complete_images(runs, max_tokens, n):
  experiment, checkpoint = runs["images"]
  params, split = checkpoint.train_state.params, experiment.open_split("test")
  metrics = experiment.measure_split(params, checkpoint.config, split, max_tokens=max_tokens)
  assert metrics.keys() == {"loss_lm"}  # the measures are defined for the complete split
  want = tvq.evaluate(params, checkpoint.config, split.stream.head(n), batch_size=1)
  assert want.tokens == n
  np.testing.assert_allclose(metrics["loss_lm"], want.nats_per_token, rtol=1e-5)


def test_limit_beyond_the_split_reads_all_of_it(runs):
  experiment, checkpoint = runs["images"]
  params, split = checkpoint.train_state.params, experiment.open_split("test")
  metrics = experiment.measure_split(params, checkpoint.config, split)
  assert metrics.keys() == {"loss_lm", "bits_per_dim"}
  limit = split.statistics.n_token + 1
  assert metrics == experiment.measure_split(params, checkpoint.config, split, max_tokens=limit)


def test_stopped_validation_has_no_metrics(runs):
  experiment, checkpoint = runs["text"]
  params, split = checkpoint.train_state.params, experiment.open_split("test")
  assert experiment.measure_split(params, checkpoint.config, split, stop=True) is None


def test_best_checkpoint_has_the_lowest_validation_loss(runs):
  experiment, checkpoint = runs["text"]
  losses = {
    record["step"]: record["validation_loss_lm"]
    for record in metric_writers.read_records(experiment.workdir)
    if "validation_loss_lm" in record
  }
  assert len(losses) == 2
  best = checkpoints.load_run(experiment.workdir)
  assert int(best.train_state.step) == min(losses, key=losses.get)
  last = checkpoints.load_run(experiment.workdir, weights="last")
  assert int(last.train_state.step) == int(checkpoint.train_state.step) == 8


def test_newest_checkpoint_is_loaded_if_there_is_no_best_one(tmp_path):
  tvq.save_checkpoint(tmp_path, helpers.make_checkpoint(4))
  assert int(checkpoints.load_run(tmp_path).train_state.step) == 4


def test_damaged_best_checkpoint_points_to_the_last_one(tmp_path):
  for directory in (tmp_path, tmp_path / "best"):
    tvq.save_checkpoint(directory, helpers.make_checkpoint(4))
  damage(tmp_path / "best" / "checkpoints" / "4", "empty")
  with pytest.raises(tvq.CheckpointError, match=r"best/checkpoints/4 is damaged.*--weights=last"):
    checkpoints.load_run(tmp_path)
  assert int(checkpoints.load_run(tmp_path, weights="last").train_state.step) == 4


def test_fields_that_keep_the_parameters_may_be_changed(runs):
  experiment, _ = runs["text"]
  loaded = checkpoints.load_run(experiment.workdir, changes={"precision": "bfloat16"})
  assert loaded.config == CONFIG.replace(precision="bfloat16")


def test_fields_that_change_the_parameters_are_rejected(runs):
  experiment, _ = runs["text"]
  with pytest.raises(ValueError, match="params do not fit this config"):
    checkpoints.load_run(experiment.workdir, changes={"d_model": 32})
