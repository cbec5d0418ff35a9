"""The metrics that papers report: one definition for all commands, records and messages."""

import dataclasses
import math

import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data.token_cache import SplitStatistics
from tvq_haiku.evaluation.likelihood import Likelihood
from tvq_haiku.run import measures

STATISTICS = SplitStatistics(
  n_document=2,
  n_byte=8,
  n_word=4,
  n_token=10,
  unigram_entropy=1.0,
  checksum=0,
  vocabulary="bytes",
  dtype="|u1",
  offset=3,
)


def test_ends_of_documents_have_bits_but_no_bytes_and_no_words():
  total = Likelihood(nats=16 * math.log(2), tokens=10)
  value = {name: x.compute(total, STATISTICS) for name, x in measures.MEASURES.items()}
  assert value == pytest.approx({"bits_per_byte": 2, "bits_per_dim": 2, "word_perplexity": 16})


@pytest.mark.parametrize(
  "metrics, text",
  [
    ({"loss_lm": 1.0, "bits_per_dim": 1.5}, "1.5000 bits per dimension"),
    ({"loss_lm": 1.0, "bits_per_byte": 2.0, "word_perplexity": 123456.0}, "2.0000 bits per byte"),
    ({"word_perplexity": 123456.0, "bits_per_byte": 2.0}, "perplexity 1.23e+05 per word"),
    ({"loss_lm": math.log(4)}, "2.0000 bits per piece"),
  ],
)
def test_main_measure_is_described(metrics, text):
  assert measures.describe(metrics, "piece") == text


@pytest.mark.slow
def test_all_ways_to_compute_bits_per_byte_agree(runs, tmp_path):
  """A text with tokens that end documents, of which each byte is a token."""
  experiment, checkpoint = runs["text"]
  params, config = checkpoint.train_state.params, checkpoint.config
  text = b"It is a truth universally acknowledged.\n" * 40
  (tmp_path / "text.txt").write_bytes(text)
  source = data.TextFiles(tmp_path / "text.txt")
  experiment = dataclasses.replace(
    experiment, source=source, cache_dir=tmp_path / "cache", eval_rows=1
  )
  split = experiment.open_split("test")
  (chunk,) = source.read("test")
  assert split.statistics.n_token == split.statistics.n_byte + 1 == len(chunk.content) + 1
  want = experiment.measure_split(params, config, split)["bits_per_byte"]
  likelihood = tvq.evaluate(params, config, split.stream, batch_size=1)
  np.testing.assert_allclose(likelihood.bits_per(len(chunk.content)), want, rtol=1e-6)
  (score,) = tvq.score(params, config, [chunk.content]).bits_per_byte
  np.testing.assert_allclose(score, want, rtol=1e-5)
