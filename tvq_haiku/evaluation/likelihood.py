"""Likelihood of held-out text, read once with carried state."""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data import packing
from tvq_haiku.data.stream import TokenStream
from tvq_haiku.model import transformer
from tvq_haiku.parallel import sharding
from tvq_haiku.training import losses
from tvq_haiku.types import Array, Batch
from tvq_haiku.utils import checks, progress


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

  def perplexity_per(self, units: int) -> float:
    """exp(nats per unit): the perplexity per word, for `units` words; infinite beyond e^700, or of none.

    >>> round(Likelihood(nats=math.log(20) * 3, tokens=5).perplexity_per(3), 9)
    20.0
    """
    return math.exp(self.nats / units) if self.nats < 700 * units else math.inf


EvalStep = Callable[
  [Any, Batch, transformer.TransformerState], tuple[EvalSums, transformer.TransformerState]
]


def make_eval_step(
  config: TransformerConfig,
  train_cfg: TrainConfig | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> EvalStep:
  """A function `(params, batch, state) -> (EvalSums, state)`, compiled once for each shape.

  Args:
    config: the model.
    train_cfg: if given, batches must have `global_batch_size` rows.
    mesh: devices that share the work; parameters and state must be on it, and every host gives the
      whole batch.
  """

  def checked(params, batch, state):
    rows, window_len = batch["inputs"].shape
    if train_cfg is not None:
      rows = train_cfg.global_batch_size
    checks.check_batch(batch, (rows, window_len), config.n_vocab)
    if mesh is not None:
      batch = sharding.put_batch(batch, mesh, rows)
    return _eval_step(config, mesh, params, batch, state)

  return checked


@functools.partial(jax.jit, static_argnums=(0, 1))
def _eval_step(
  config: TransformerConfig,
  mesh: jax.sharding.Mesh | None,
  params: Any,
  batch: Batch,
  state: transformer.TransformerState,
) -> tuple[EvalSums, transformer.TransformerState]:
  with sharding.use_mesh(mesh):
    out = transformer.make_transformer(config).apply(
      params, None, batch["inputs"], state, doc_ids=batch.get("doc_ids")
    )
  mask = losses.loss_weights(batch)
  sums, state = (
    EvalSums(losses.weighted_nll(out.logits, batch["targets"], mask), jnp.sum(mask)),
    out.state,
  )
  if mesh is not None:
    state = jax.lax.with_sharding_constraint(
      state, sharding.state_shardings(state, mesh, config.kv_heads)
    )
    sums = jax.lax.with_sharding_constraint(sums, sharding.replicated(mesh))
  return sums, state


def _initial_state(
  config: TransformerConfig, batch_size: int, mesh: jax.sharding.Mesh | None
) -> transformer.TransformerState:
  if mesh is None:
    return transformer.initial_state(config, batch_size)
  shapes = jax.eval_shape(lambda: transformer.initial_state(config, batch_size))
  shardings = sharding.state_shardings(shapes, mesh, config.kv_heads)
  return jax.jit(lambda: transformer.initial_state(config, batch_size), out_shardings=shardings)()


def evaluate(
  config: TransformerConfig,
  params: Any,
  stream: TokenStream,
  *,
  batch_size: int = 8,
  window_len: int = 512,
  align: int = 1,
  show_progress: bool = False,
  stop: object = False,
  mesh: jax.sharding.Mesh | None = None,
) -> Likelihood | None:
  """Reads a whole stream, every token once, and adds up its likelihood.

  The stream is read as `batch_size` rows side by side, each with its own carried state: one row
  gives every token all the context there is, more rows are faster.

  Args:
    config: the model.
    params: its parameters.
    stream: what to read.
    batch_size: B.
    window_len: T; changes nothing but speed.
    align: rows begin at multiples of it, so that no document of this length is cut in two.
    show_progress: on standard error.
    stop: when it becomes true, reading ends.
    mesh: where the parameters are; None: one device.

  Returns:
    The likelihood; None if it was stopped.
  """
  if not config.causal:
    raise ValueError("evaluate: causal=False: an encoder sees the tokens that it would predict.")
  for name, value in (("batch_size", batch_size), ("window_len", window_len), ("align", align)):
    if value < 1:
      raise ValueError(f"evaluate: {name}={value!r} must be at least 1.")
  eval_step = make_eval_step(config, mesh=mesh)
  state = _initial_state(config, batch_size, mesh)
  layout = dict(batch_size=batch_size, window_len=window_len, align=align)
  sums: list[EvalSums] = []
  with progress.bar(
    "evaluating", packing.count_windows(stream, **layout), enabled=show_progress
  ) as shown:
    for batch in packing.windows(stream, **layout):
      if stop:
        return None
      step_sums, state = eval_step(params, batch, state)
      if sums:  # those of the window before are ready: reading them keeps no device waiting
        sums[-1] = jax.device_get(sums[-1])
      sums.append(step_sums)
      shown(len(sums))
  return Likelihood(
    nats=math.fsum(float(s.nats) for s in sums),
    tokens=round(math.fsum(float(s.tokens) for s in sums)),
  )
