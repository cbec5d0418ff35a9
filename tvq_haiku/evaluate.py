"""Likelihood of held-out text, read once with carried state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku import inputs
from tvq_haiku import losses
from tvq_haiku import transformer
from tvq_haiku.config import TrainConfig, TransformerConfig

Array = jax.Array


class EvalSums(NamedTuple):
  """What one window of evaluation adds up to."""

  nats: Array  # [] f32: total negative log-likelihood
  tokens: Array  # [] f32: unmasked tokens


class Likelihood(NamedTuple):
  """What a text costs under a model."""

  nats: float
  tokens: int

  @property
  def nats_per_token(self) -> float:
    return self.nats / self.tokens

  def bits_per(self, units: int) -> float:
    """Bits per byte, word or dimension, for `units` of them.

    >>> Likelihood(nats=math.log(2) * 16, tokens=9).bits_per(8)
    2.0
    """
    return self.nats / math.log(2) / units


EvalStep = Callable[[Any, losses.Batch, transformer.TransformerState],
                    tuple[EvalSums, transformer.TransformerState]]


def make_eval_step(config: TransformerConfig, train_cfg: TrainConfig | None = None) -> EvalStep:
  """A function `(params, batch, state) -> (EvalSums, state)`, compiled for each shape it meets.

  Args:
    config: the model.
    train_cfg: if given, batches must have `global_batch_size` rows.
  """
  model = transformer.make_transformer(config)

  @jax.jit
  def eval_step(params, batch, state):
    out = model.apply(params, None, batch["inputs"], state, doc_ids=batch.get("doc_ids"))
    mask = losses.loss_weights(batch)
    nll = losses.token_nll(out.logits, batch["targets"])
    # A padding token's nll means nothing and may be anything: select, do not multiply.
    return EvalSums(jnp.sum(jnp.where(mask > 0, mask * nll, 0.0)), jnp.sum(mask)), out.state

  def checked(params, batch, state):
    rows, window_len = batch["inputs"].shape
    if train_cfg is not None:
      rows = train_cfg.global_batch_size
    inputs.check_batch(batch, (rows, window_len), config.n_vocab)
    return eval_step(params, batch, state)

  return checked


def evaluate(config: TransformerConfig, params: Any, batches: Iterable[losses.Batch], *,
             progress: Callable[[Iterable], Iterable] = iter) -> Likelihood:
  """Reads consecutive windows from a fresh state and adds up their likelihood.

  Args:
    config: the model.
    params: its parameters.
    batches: windows of one shape, in reading order (`data.windows`).
    progress: wraps the batches, such as `tqdm.tqdm`.
  """
  eval_step = make_eval_step(config)
  state, sums = None, []
  for batch in progress(batches):
    if state is None:
      state = transformer.initial_state(config, batch["inputs"].shape[0])
    step_sums, state = eval_step(params, batch, state)
    sums.append(step_sums)
  if not sums:
    raise ValueError("evaluate: there is nothing to read.")
  return Likelihood(nats=math.fsum(float(s.nats) for s in sums),
                    tokens=round(math.fsum(float(s.tokens) for s in sums)))
