"""The commands of an experiment: training and evaluation."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.checkpoint import checkpoints
from tvq_haiku.data import toy_datasets
from tvq_haiku.run import commands, metric_writers, run_record
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.utils import files

import small_experiments
from small_experiments import CONFIG, KINDS, OPTIONS

pytestmark = pytest.mark.slow


def read_likelihood(experiment, checkpoint, split):
  """Returns nats, tokens, bytes and words of a split, one document at a time."""
  apply = jax.jit(tvq.make_transformer(checkpoint.config).apply)
  nats, n_token, content = 0.0, 0, b""
  for document in experiment.source.read(split):
    tokens = experiment.vocabulary.encode(document.content)
    targets = np.append(tokens, 1) if experiment.source.has_eos else tokens
    inputs, state = np.append(1, targets[:-1]), tvq.initial_state(checkpoint.config, 1)
    out = apply(checkpoint.train_state.params, None, inputs[None], state)
    logprobs = np.asarray(jax.nn.log_softmax(out.logits[0]))
    nats -= float(np.take_along_axis(logprobs, targets[:, None], axis=1).sum())
    n_token += len(targets)
    content += document.content
  return nats, n_token, len(content), len(content.split())


class TestEvaluate:
  @pytest.mark.parametrize("kind", KINDS)
  def test_metrics_count_every_token_once(self, runs, kind):
    experiment, checkpoint = runs[kind]
    nats, n_token, n_byte, n_word = read_likelihood(experiment, checkpoint, "test")
    # Only images fit into the rows of a batch; a text loses context where it is split into rows.
    for n_row in (1, 3) if kind == "images" else (1,):
      e = dataclasses.replace(experiment, eval_rows=n_row)
      metrics, _ = commands.evaluate(e, checkpoint, "test", weights="last")
      np.testing.assert_allclose(metrics["loss_lm"], nats / n_token, rtol=1e-5)
      measure, value = {
        "text": ("bits_per_byte", nats / math.log(2) / n_byte),
        "images": ("bits_per_dim", nats / math.log(2) / n_byte),
        "books": ("word_perplexity", math.exp(nats / n_word)),
      }[kind]
      np.testing.assert_allclose(metrics[measure], value, rtol=2e-4)
      assert metrics | {"loss_lm": None, measure: None} == {
        "loss_lm": None,
        measure: None,
        "split": "test",
        "data": None,
        "checksum": experiment.open_split("test").statistics.checksum,
        "weights": "last",
        "step": 8,
        "tokens": n_token,
        "bytes": n_byte,
        "rows": n_row,
      }

  def test_metrics_are_written(self, runs):
    experiment, checkpoint = runs["text"]
    for split in ("validation", "test"):
      metrics, file = commands.evaluate(experiment, checkpoint, split)
      assert file == experiment.workdir / f"{split}.figures.json"
      assert json.loads(file.read_text()) == metrics

  @pytest.mark.parametrize("changed", ["all", "test"])
  def test_metrics_of_other_data_are_written_to_another_file(self, runs, tmp_path, changed):
    """Data of the same name and size, of which all bytes or only those of the test split differ."""
    experiment, checkpoint = runs["text"]
    own = commands.evaluate(experiment, checkpoint, "test")
    if changed == "all":  # the data of the run are recognized before they are evaluated
      own[1].unlink()
    content = bytearray(experiment.source._file.read_bytes())
    start = {"all": 0, "test": 2850}[changed]
    content[start:] = bytes(byte ^ 1 for byte in content[start:])
    (tmp_path / "enwik8").write_bytes(content)
    other = dataclasses.replace(
      experiment,
      source=data.Enwik8(tmp_path, n_byte=3000),
      data_dir=tmp_path / "enwik8",
      cache_dir=tmp_path / "cache",
    )
    metrics, file = commands.evaluate(other, checkpoint, "test")
    assert file.name == f"test-enwik8-{metrics['checksum']:08x}.figures.json"
    assert json.loads(file.read_text()) == metrics and metrics["data"] == str(tmp_path / "enwik8")
    assert commands.evaluate(other, checkpoint, "test") == (metrics, file)
    assert commands.evaluate(experiment, checkpoint, "test") == own
    assert json.loads(own[1].read_text()) == own[0]

  def test_damaged_tokens_are_rejected(self, runs, tmp_path):
    experiment = dataclasses.replace(runs["text"][0], cache_dir=tmp_path)
    experiment.open_split("test")
    (file,) = tmp_path.glob("enwik8-test-*/tokens.bin")
    content = file.read_bytes()
    file.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    with pytest.raises(ValueError, match=r"tokens\.bin is damaged"):
      commands.evaluate(experiment, runs["text"][1], "test")


class TestTrain:
  def test_metrics_of_training_and_validation_are_recorded(self, runs):
    experiment, checkpoint = runs["text"]
    records = metric_writers.read_records(experiment.workdir)
    training = [record for record in records if "loss_lm" in record]
    assert [record["step"] for record in training] == [2, 4, 6, 8]
    assert {"loss", "loss_commit", "grad_norm", "learning_rate", "code_use"} <= training[-1].keys()
    assert 1 <= training[-1]["code_perplexity"] <= CONFIG.n_code
    assert training[-1]["tokens_per_second"] > 0 and training[-1]["flops_per_second"] > 0
    # The peak speed of a machine varies, so no record claims a fraction of it.
    assert not any("peak" in name for record in records for name in record)
    validation = [record for record in records if "validation_loss_lm" in record]
    assert [record["step"] for record in validation] == [4, 8]
    assert validation[-1].keys() == {"step", "validation_loss_lm", "validation_bits_per_byte"}
    assert int(checkpoint.train_state.step) == 8

  def test_killed_and_resumed_run_equals_an_uninterrupted_one(self, runs, tmp_path, monkeypatch):
    """A process dies after a checkpoint and before its validation is done."""
    uninterrupted, checkpoint = runs["text"]
    experiment = dataclasses.replace(uninterrupted, workdir=tmp_path)

    class Killed(BaseException):
      pass

    def die(*args, **kwargs):
      raise Killed

    with monkeypatch.context() as patch:
      patch.setattr(experiment_lib.Experiment, "measure_split", die)
      with pytest.raises(Killed):
        commands.train(experiment, options=OPTIONS, tensorboard=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
      file.write('{"step": 6, "loss_lm": 9.9}\n')  # of updates after the checkpoint
    resumed = commands.train(experiment, options=OPTIONS, tensorboard=False)
    jax.tree.map(np.testing.assert_array_equal, resumed.train_state, checkpoint.train_state)

    def records_without_speed(workdir):
      return [
        {name: x for name, x in record.items() if not name.endswith("_per_second")}
        for record in metric_writers.read_records(workdir)
      ]

    assert records_without_speed(tmp_path) == records_without_speed(uninterrupted.workdir)

  def test_validation_reads_at_most_the_given_tokens(self, tmp_path):
    experiment = small_experiments.make_experiment(tmp_path, "text")
    commands.train(experiment, options=OPTIONS, tensorboard=False, validate_tokens=40)
    (first, last) = (
      record
      for record in metric_writers.read_records(experiment.workdir)
      if "validation_loss_lm" in record
    )
    assert first.keys() == last.keys() == {"step", "validation_loss_lm"}
    checkpoint = checkpoints.load_run(experiment.workdir, weights="last")
    metrics = experiment.measure_split(
      checkpoint.train_state.params, CONFIG, experiment.open_split("validation"), max_tokens=40
    )
    np.testing.assert_allclose(last["validation_loss_lm"], metrics["loss_lm"], rtol=1e-6)

  def test_vocabulary_is_saved_with_the_run(self, runs):
    experiment, _ = runs["books"]
    saved = data.PieceVocabulary(experiment.workdir / "vocab.model")
    assert saved.fingerprint == experiment.vocabulary.fingerprint

  def test_experiment_is_recorded(self, runs):
    for kind, record in {
      "text": run_record.RunRecord("small-text", None, 0.7),
      "images": run_record.RunRecord("small-images", small_experiments.IMAGE_SIZE, 0.7),
    }.items():
      assert run_record.read_record(runs[kind][0].workdir) == record

  def test_directory_in_use_is_rejected(self, runs):
    experiment, _ = runs["text"]
    with (
      files.lock(experiment.workdir / ".lock"),
      pytest.raises(tvq.CheckpointError, match=r"another process trains in .*/text"),
    ):
      commands.train(experiment, tensorboard=False)

  def test_other_data_is_rejected(self, runs, tmp_path):
    source = data.Enwik8(toy_datasets.write_text(tmp_path, n_byte=4000), n_byte=4000)
    experiment = dataclasses.replace(runs["text"][0], source=source)
    message = r"data mismatch .*: train n_byte is 2700 in the run, 3600 here"
    with pytest.raises(tvq.CheckpointError, match=message):
      commands.train(experiment, tensorboard=False)

  def test_another_configuration_is_rejected(self, runs):
    experiment = dataclasses.replace(runs["text"][0], config=CONFIG.replace(n_code=7))
    with pytest.raises(tvq.CheckpointError, match="n_code is 6 in the run, 7 here"):
      commands.train(experiment, tensorboard=False)


def test_another_vocabulary_is_rejected(runs, tmp_path):
  experiment, checkpoint = runs["books"]
  lines = experiment.source.sample(1500, seed=1)
  other = data.train_pieces(lines, tmp_path / "other.model", size=330)
  changed = dataclasses.replace(experiment, vocabulary=other)
  message = rf"is {experiment.vocabulary.fingerprint} in the run, {other.fingerprint} here"
  with pytest.raises(tvq.CheckpointError, match=message):
    commands.evaluate(changed, checkpoint, "test")
  with pytest.raises(tvq.CheckpointError, match=r"data mismatch .*: train vocabulary is"):
    commands.train(changed, tensorboard=False)
  saved = data.PieceVocabulary(experiment.workdir / "vocab.model")
  assert saved.fingerprint == experiment.vocabulary.fingerprint  # not overwritten
