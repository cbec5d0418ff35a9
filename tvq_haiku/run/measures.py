"""The metrics that papers report, computed from the likelihood of a complete split.

bits_per_byte      bits of all tokens, divided by the number of bytes of the documents
bits_per_dim       the same for images, whose bytes are the dimensions
word_perplexity    exp(nats of all tokens, divided by the number of words of the documents)

All tokens are the tokens of the documents and the tokens that end documents. The model predicts the
latter, too, so they have a likelihood, but they have no bytes and no words. `info`, `score`,
`evaluate` and the messages of a run use this definition. A compressed file has no tokens that end
documents; it stores its number of tokens instead. `loss_lm`, the loss of training, is a mean over
tokens instead: nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import NamedTuple, Protocol

from tvq_haiku.data.token_cache import SplitStatistics
from tvq_haiku.evaluation.likelihood import Likelihood


class _Compute(Protocol):
  def __call__(self, total: Likelihood, statistics: SplitStatistics) -> float: ...


class Measure(NamedTuple):
  """A metric of a split."""

  compute: _Compute
  template: str  # text with a place for the value


# Name of a metric -> the metric.
MEASURES: Mapping[str, Measure] = {
  "bits_per_byte": Measure(
    lambda total, statistics: total.bits_per(statistics.n_byte), "{} bits per byte"
  ),
  "bits_per_dim": Measure(
    lambda total, statistics: total.bits_per(statistics.n_byte), "{} bits per dimension"
  ),
  "word_perplexity": Measure(
    lambda total, statistics: total.perplexity_per(statistics.n_word), "perplexity {} per word"
  ),
}


def describe(metrics: Mapping[str, float], token_name: str = "token") -> str:
  """Returns the first of the measures in `metrics` as text, or the loss if there is none.

  There is none if only a part of the split was read, whose bytes and words are not known.

  Args:
    metrics: metrics of a split, with `loss_lm` in nats per token.
    token_name: what a token is.

  >>> describe({"loss_lm": math.log(2), "bits_per_byte": 1.0625})
  '1.0625 bits per byte'
  >>> describe({"loss_lm": math.log(2)})
  '1.0000 bits per token'
  """
  for name, value in metrics.items():
    if name in MEASURES:
      return MEASURES[name].template.format(format_value(value))
  return f"{format_value(metrics['loss_lm'] / math.log(2))} bits per {token_name}"


def format_value(value: float) -> str:
  """Returns a metric with four decimal places, or three digits if it is very large.

  >>> format_value(2.34567), format_value(1234567.0)
  ('2.3457', '1.23e+06')
  """
  return f"{value:.4f}" if value < 1e5 else f"{value:.3g}"
