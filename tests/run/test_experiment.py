"""Experiments on small data in the formats of the large ones: from raw files to figures."""

import dataclasses
import json
import math

import jax
import numpy as np
from PIL import Image
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import toy_datasets
from tvq_haiku.evaluation import memory_plan
from tvq_haiku.run import commands, metric_writers, summary, trainer
from tvq_haiku.run import experiment as experiment_lib
from tvq_haiku.utils import files

CONFIG = tvq.TransformerConfig.tiny(
  d_model=16, d_k=8, d_v=16, n_code=6, n_layer=1, block_len=8, mem_len=8
)
TRAIN = tvq.TrainConfig(
  n_warmup_step=1, n_max_step=8, sequence_len=48, update_len=24, global_batch_size=2
)

OPTIONS = trainer.TrainerOptions(validate_every=4, log_every=2)


def make(root, kind, **changes):
  """An experiment under `root`, on data that other experiments under it share."""
  source = {
    "text": lambda: data.Enwik8(toy_datasets.write_text(root / "text", n_byte=3000), n_byte=3000),
    "books": lambda: data.Books(toy_datasets.write_books(root / "books", n_byte=700)),
    "images": lambda: data.DownsampledImages(
      toy_datasets.write_images(root / "images", size=4), n_train=50, size=4
    ),
  }[kind]()
  measures = {"text": ["bits_per_byte"], "books": ["word_perplexity"], "images": ["bits_per_dim"]}[
    kind
  ]
  config, vocabulary = CONFIG, data.ByteVocabulary
  if kind == "books":
    vocabulary = data.train_pieces(source.sample(10**5, seed=0), root / "books.model", size=330)
    config = config.replace(n_vocab=330)
  return experiment_lib.Experiment(
    **{
      **dict(
        source=source,
        vocabulary=vocabulary,
        config=config,
        train_cfg=TRAIN,
        workdir=root / kind,
        cache_dir=root / "cache",
        measures=measures,
        token_name="byte",
        eval_rows=3,
        eval_window=32,
        image_size=4 if kind == "images" else None,
      ),
      **changes,
    }
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  made = {}
  for kind in ("text", "books", "images"):
    experiment = make(root, kind)
    made[kind] = (
      experiment,
      commands.train(experiment, options=OPTIONS, tensorboard=False),
    )
  return made


@pytest.mark.parametrize("kind", ["text", "books", "images"])
def test_figures_are_of_every_token_once(runs, kind):
  experiment, _ = runs[kind]
  run = experiment_lib.load_run(experiment.workdir, weights="last")
  found = commands.evaluate(experiment, run, "test")
  # One document at a time, in one piece, from nothing.
  apply = jax.jit(tvq.make_transformer(run.config).apply)
  nats, n_token, raw = 0.0, 0, b""
  for piece in experiment.source.read("test"):
    tokens = experiment.vocabulary.encode(piece.content)
    targets = np.append(tokens, 1) if experiment.source.has_eos else tokens
    inputs = np.append(1, targets[:-1])
    out = apply(run.train_state.params, None, inputs[None], tvq.initial_state(run.config, 1))
    logprobs = jax.nn.log_softmax(out.logits[0])
    nats -= float(np.take_along_axis(np.asarray(logprobs), targets[:, None], axis=1).sum())
    n_token += len(targets)
    raw += piece.content
  n_byte, n_word = len(raw), len(raw.split())
  rows_of_their_own = (
    kind != "images"
  )  # a text that is cut into rows has less context at their begins
  alone = commands.evaluate(dataclasses.replace(experiment, eval_rows=1), run, "test")
  for figures in (alone, found)[: 1 if rows_of_their_own else 2]:
    np.testing.assert_allclose(figures["loss_lm"], nats / n_token, rtol=1e-5)
    want = {
      "bits_per_byte": nats / math.log(2) / n_byte,
      "bits_per_dim": nats / math.log(2) / n_byte,
      "word_perplexity": math.exp(nats / n_word),
    }[experiment.measures[0]]
    np.testing.assert_allclose(figures[experiment.measures[0]], want, rtol=2e-4)
  assert found["tokens"] == n_token and found["bytes"] == n_byte
  assert json.loads((experiment.workdir / "test.figures.json").read_text())["tokens"] == n_token


def test_records_hold_what_a_run_is_judged_by(runs):
  experiment, run = runs["text"]
  lines = metric_writers.read_records(experiment.workdir)
  trained = [line for line in lines if "loss_lm" in line]
  assert [line["step"] for line in trained] == [2, 4, 6, 8]
  assert {
    "loss",
    "loss_commit",
    "grad_norm",
    "learning_rate",
    "code_perplexity",
    "code_use",
    "tokens_per_second",
    "of_peak",
  } <= trained[-1].keys()
  assert 1 <= trained[-1]["code_perplexity"] <= CONFIG.n_code and trained[-1]["of_peak"] > 0
  validated = [line for line in lines if "validation_loss_lm" in line]
  assert [line["step"] for line in validated] == [4, 8] and "validation_bits_per_byte" in validated[
    0
  ]
  assert int(run.train_state.step) == 8


def test_best_and_last_checkpoints(runs):
  experiment, run = runs["text"]
  best, last = (
    experiment_lib.load_run(experiment.workdir),
    experiment_lib.load_run(experiment.workdir, weights="last"),
  )
  losses = {
    line["step"]: line["validation_loss_lm"]
    for line in metric_writers.read_records(experiment.workdir)
    if "validation_loss_lm" in line
  }
  assert int(best.train_state.step) == min(losses, key=losses.get)
  assert int(last.train_state.step) == int(run.train_state.step)
  changed = experiment_lib.load_run(experiment.workdir, changes={"precision": "bfloat16"})
  assert changed.config == best.config.replace(precision="bfloat16")


def test_a_validation_may_read_less(runs):
  experiment, run = runs["images"]
  split = experiment.open_split("test")
  whole = experiment.measure_split(run.config, run.train_state.params, split)
  less = experiment.measure_split(
    run.config, run.train_state.params, split, max_tokens=100
  )  # 2 images of 48
  assert whole.keys() == {"loss_lm", "bits_per_dim"} and less.keys() == {"loss_lm"}
  two = tvq.evaluate(run.config, run.train_state.params, split.stream.head(96), batch_size=1)
  assert two.tokens == 96
  np.testing.assert_allclose(less["loss_lm"], two.nats_per_token, rtol=1e-5)
  assert experiment.measure_split(run.config, run.train_state.params, split, stop=True) is None


def test_a_run_has_its_own_vocabulary(runs):
  experiment, _ = runs["books"]
  assert data.PieceVocabulary(experiment.workdir / "vocab.model").fingerprint == (
    experiment.vocabulary.fingerprint
  )


def test_the_vocabulary_must_be_that_of_the_run(runs, tmp_path):
  experiment, run = runs["books"]
  lines = experiment.source.sample(1500, seed=1)
  other = dataclasses.replace(
    experiment, vocabulary=data.train_pieces(lines, tmp_path / "other.model", size=330)
  )
  message = r"vocabulary .* is pieces-330-\w+ in the run, pieces-330-\w+ here\. Leave --vocab out"
  for use in (
    lambda: commands.evaluate(other, run, "test"),
    lambda: commands.sample_texts(other, run, [b""], max_new_tokens=3),
  ):
    with pytest.raises(tvq.CheckpointError, match=message):
      use()
  with pytest.raises(tvq.CheckpointError, match=r"data mismatch .*: train vocabulary is"):
    commands.train(other, tensorboard=False)
  assert data.PieceVocabulary(experiment.workdir / "vocab.model").fingerprint == (
    experiment.vocabulary.fingerprint
  )


def test_one_process_trains_in_a_directory(runs):
  experiment, _ = runs["text"]
  with (
    files.lock(experiment.workdir / ".lock"),
    pytest.raises(tvq.CheckpointError, match="another process trains in"),
  ):
    commands.train(experiment, tensorboard=False)


def test_an_encoder_is_refused_at_once(runs):
  with pytest.raises(ValueError, match="causal=False: an encoder attends"):
    dataclasses.replace(runs["text"][0], config=CONFIG.replace(causal=False))


def test_no_words_no_perplexity():
  assert tvq.Likelihood(nats=3.0, tokens=1).perplexity_per(0) == math.inf


@pytest.mark.parametrize("text", ["", "[1]", '{"train": {}}'])
def test_damaged_facts(runs, tmp_path, text):
  experiment, run = runs["text"]
  (tmp_path / "data.json").write_text(text)
  with pytest.raises(tvq.CheckpointError, match=r"data\.json is damaged"):
    commands.evaluate(dataclasses.replace(experiment, workdir=tmp_path), run, "test")


def test_changes_that_need_other_parameters_are_refused(runs):
  experiment, _ = runs["text"]
  with pytest.raises(ValueError, match="params do not fit this config"):
    experiment_lib.load_run(experiment.workdir, changes={"d_model": 32})


def test_damaged_tokens_give_no_figures(runs, tmp_path):
  experiment = dataclasses.replace(runs["text"][0], cache_dir=tmp_path)
  experiment.open_split("test")
  (file,) = tmp_path.glob("enwik8-test-*/tokens.bin")
  content = file.read_bytes()
  file.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
  with pytest.raises(ValueError, match=r"tokens\.bin is damaged: remove its directory"):
    commands.evaluate(experiment, runs["text"][1], "test")


def test_samples_are_texts_and_grids(runs):
  experiment, run = runs["books"]
  texts, file = commands.sample_texts(
    experiment, run, [b"Anne ", b""], max_new_tokens=12, temperature=0.8
  )
  assert texts[0].startswith("Anne ") and len(texts) == 2
  assert all(text in file.read_text() for text in texts) and file.parent.name == "samples"
  _, other = commands.sample_texts(experiment, run, [b""], max_new_tokens=1)
  assert other != file and other.exists() and file.exists()
  experiment, run = runs["images"]
  with Image.open(commands.sample_images(experiment, run, 3)) as page:
    assert page.size == (2 * 6 + 2, 2 * 6 + 2)


def test_other_data_other_sizes_and_other_settings_are_refused(runs, tmp_path):
  experiment, _ = runs["text"]
  other = data.Enwik8(toy_datasets.write_text(tmp_path, n_byte=4000), n_byte=4000)
  with pytest.raises(
    tvq.CheckpointError, match=r"data mismatch .*: train n_byte is 2700 in the run, 3600 here"
  ):
    commands.train(dataclasses.replace(experiment, source=other), tensorboard=False)
  with pytest.raises(tvq.CheckpointError, match="n_code is 6 in the run, 7 here"):
    commands.train(
      dataclasses.replace(experiment, config=CONFIG.replace(n_code=7)), tensorboard=False
    )
  with pytest.raises(ValueError, match="n_vocab=330, not the 259"):
    dataclasses.replace(experiment, config=CONFIG.replace(n_vocab=330))
  with pytest.raises(
    ValueError, match="sequence_len=48 must be a multiple of 192, the number of tokens per image"
  ):
    dataclasses.replace(runs["images"][0], image_size=8)


def test_interrupted_and_resumed_records_are_those_of_a_whole_run(runs, tmp_path, monkeypatch):
  """Killed half-way, a run makes the same records and the same parameters again."""
  whole, run = runs["text"]

  class Killed(BaseException):
    pass

  experiment = dataclasses.replace(whole, workdir=tmp_path)
  measure = experiment_lib.Experiment.measure_split

  def killed(self, *args, **kwargs):
    raise Killed

  monkeypatch.setattr(experiment_lib.Experiment, "measure_split", killed)
  with pytest.raises(Killed):  # after the checkpoint at update 4, before its validation is noted
    commands.train(experiment, options=OPTIONS, tensorboard=False)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "loss_lm": 9.9}\n')  # of updates that no checkpoint holds
  monkeypatch.setattr(experiment_lib.Experiment, "measure_split", measure)
  resumed = commands.train(experiment, options=OPTIONS, tensorboard=False)
  jax.tree.map(np.testing.assert_array_equal, resumed.train_state, run.train_state)
  timeless = lambda workdir: [
    {name: value for name, value in line.items() if name not in ("tokens_per_second", "of_peak")}
    for line in metric_writers.read_records(workdir)
  ]
  assert timeless(tmp_path) == timeless(whole.workdir)


def test_a_summary_counts_what_there_is(runs):
  experiment, run = runs["text"]
  assert summary.count_params(CONFIG) == sum(
    x.size for x in jax.tree.leaves(run.train_state.params)
  )
  assert summary.state_bytes(CONFIG) == sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tvq.initial_state(CONFIG, 1))
  )
  parts = memory_plan.plan_memory(CONFIG, TRAIN).memory
  assert parts["parameters"] == 4 * summary.count_params(CONFIG) and min(parts.values()) > 0
  text = summary.describe_model(CONFIG, TRAIN)
  assert f"{summary.count_params(CONFIG):,}" in text and "d_model           16" in text
  line = summary.describe_data("train", experiment.open_split("train").statistics)
  assert "2,700 tokens" in line and "unigram entropy" in line
