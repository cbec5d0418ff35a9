"""Likelihood of a token stream under a model, in one pass with carried state.

Letters: B batch, T tokens of a window, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.data import packing
from tvq_haiku.data.stream import TokenStream
from tvq_haiku.model import preconditions, transformer
from tvq_haiku.parallel import sharding
from tvq_haiku.training import losses
from tvq_haiku.types import Array, Batch, Params, StopRequest
from tvq_haiku.utils import checks, progress, value_checks


class EvalSums(NamedTuple):
  """Sums over one window of a batch."""

  nats: Array  # [] f32: negative log-likelihood of the unmasked tokens
  tokens: Array  # [] f32: number of unmasked tokens


class Likelihood(NamedTuple):
  """Likelihood of a text under a model."""

  nats: float  # negative log-likelihood of all tokens
  tokens: int  # number of tokens, including those that end documents

  @property
  def nats_per_token(self) -> float:
    """Mean negative log-likelihood of a token."""
    return self.nats / self.tokens

  def bits_per(self, units: int) -> float:
    """Computes the bits per unit of a text with `units` units, such as bytes or image dimensions.

    >>> Likelihood(nats=math.log(2) * 16, tokens=9).bits_per(8)
    2.0
    """
    return self.nats / math.log(2) / units

  def perplexity_per(self, units: int) -> float:
    """Computes exp(nats per unit), the perplexity of a text with `units` units, such as words.

    The result is infinite if there are no units, or at least 700 nats per unit.

    >>> round(Likelihood(nats=math.log(20) * 3, tokens=5).perplexity_per(3), 9)
    20.0
    """
    return math.exp(self.nats / units) if self.nats < 700 * units else math.inf


# (params, batch, state before the window) -> (sums, state after the window)
EvalStep = Callable[
  [Params, Batch, transformer.TransformerState], tuple[EvalSums, transformer.TransformerState]
]


def make_eval_step(
  config: TransformerConfig,
  train_cfg: TrainConfig | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> EvalStep:
  """Makes a function `(params, batch, state) -> (EvalSums, state)` that evaluates one window.

  It is compiled once for each shape of a batch.

  Args:
    config: configuration of the model.
    train_cfg: if given, batches must have `global_batch_size` elements. None: any number.
    mesh: devices that share the work; parameters and state must be on these devices, and every
      process must pass the complete batch. None: one device.

  Returns:
    The function. `batch` holds `inputs` and `targets` [B, T] (with `no_emb`, `inputs` are features
    [B, T, D]), and optionally `doc_ids` and `loss_mask` [B, T]; `state` is from `initial_state` or
    from the previous window.
  """

  def eval_step(
    params: Params, batch: Batch, state: transformer.TransformerState
  ) -> tuple[EvalSums, transformer.TransformerState]:
    B, T = batch["inputs"].shape[:2]
    if train_cfg is not None:
      B = train_cfg.global_batch_size
    n_feature = config.d_model if config.no_emb else None
    checks.check_batch(batch, (B, T), config.n_vocab, n_feature=n_feature)
    if mesh is not None:
      batch = sharding.put_batch(batch, mesh, B)
    return _eval_step(params, config, batch, state, mesh)

  return eval_step


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _eval_step(
  params: Params,
  config: TransformerConfig,
  batch: Batch,
  state: transformer.TransformerState,
  mesh: jax.sharding.Mesh | None,
) -> tuple[EvalSums, transformer.TransformerState]:
  """Evaluates one window [B, T]."""
  chex.assert_equal_shape_prefix([batch["inputs"], batch["targets"]], 2)
  with sharding.use_mesh(mesh):
    out = transformer.make_transformer(config).apply(
      params, None, batch["inputs"], state, doc_ids=batch.get("doc_ids")
    )
  chex.assert_shape(out.logits, (*batch["targets"].shape, config.n_vocab))
  weights = losses.loss_weights(batch)
  nats = losses.weighted_nll(out.logits, batch["targets"], weights)
  sums, state = EvalSums(nats, jnp.sum(weights)), out.state
  if mesh is not None:
    state = jax.lax.with_sharding_constraint(
      state, sharding.state_shardings(state, mesh, config.kv_heads)
    )
    sums = jax.lax.with_sharding_constraint(sums, sharding.replicated(mesh))
  return sums, state


def evaluate(
  params: Params,
  config: TransformerConfig,
  stream: TokenStream,
  *,
  batch_size: int = 8,
  window_len: int = 512,
  align: int = 1,
  show_progress: bool = False,
  stop: StopRequest = False,
  mesh: jax.sharding.Mesh | None = None,
) -> Likelihood | None:
  """Computes the likelihood of a stream; every token counts once.

  The stream is split into `batch_size` contiguous parts, which are read in parallel, each with a
  state of its own. With one part, every token has all earlier tokens as context; more parts are
  faster.

  Args:
    params: parameters of the model.
    config: configuration of the model.
    stream: tokens to evaluate.
    batch_size: B, the number of parts.
    window_len: T, the number of tokens of each part in a step; the result does not depend on it.
    align: parts begin at multiples of this number of tokens, so that a document of this length,
      such as an image, is never split.
    show_progress: whether to show progress on standard error.
    stop: checked before each step; when it is true, the evaluation stops.
    mesh: the mesh that the parameters are on. None: one device.

  Returns:
    The likelihood, or None if the evaluation was stopped.

  Raises:
    ValueError: the model is an encoder or reads features, `params` do not fit it, or a size is less
      than 1.
    TypeError: an argument has a wrong type; the message names it.
  """
  preconditions.check_language_model("evaluate", params, config)
  if not isinstance(stream, TokenStream):
    raise TypeError(
      "evaluate: stream must be a TokenStream, such as tvq_haiku.data.stream_of([tokens]), got "
      f"{type(stream).__name__}."
    )
  batch_size, window_len, align = (
    value_checks.check_integer("evaluate", name, value)
    for name, value in (("batch_size", batch_size), ("window_len", window_len), ("align", align))
  )
  eval_step = make_eval_step(config, mesh=mesh)
  state = _initial_state(config, batch_size, mesh)
  layout = dict(batch_size=batch_size, window_len=window_len, align=align)
  n_window = packing.count_windows(stream, **layout)
  window_sums: list[EvalSums] = []
  with progress.bar("evaluating", n_window, enabled=show_progress) as report:
    for batch in packing.windows(stream, **layout):
      if stop:
        return None
      sums, state = eval_step(params, batch, state)
      if window_sums:
        # Fetches the sums of the previous window while the device evaluates this one.
        window_sums[-1] = jax.device_get(window_sums[-1])
      window_sums.append(sums)
      report(len(window_sums))
  return Likelihood(
    nats=math.fsum(float(sums.nats) for sums in window_sums),
    tokens=round(math.fsum(float(sums.tokens) for sums in window_sums)),
  )


def _initial_state(
  config: TransformerConfig, batch_size: int, mesh: jax.sharding.Mesh | None
) -> transformer.TransformerState:
  """Returns the state before the first token, on the devices of `mesh`."""
  if mesh is None:
    return transformer.initial_state(config, batch_size)
  initial = functools.partial(transformer.initial_state, config, batch_size)
  shardings = sharding.state_shardings(jax.eval_shape(initial), mesh, config.kv_heads)
  return jax.jit(initial, out_shardings=shardings)()
