"""Reading prompts of different lengths before sampling.

Letters: B batch, P longest prompt, T tokens of one window, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.attention.compressive_cache import NO_DOCUMENT
from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import transformer
from tvq_haiku.ops.padding import round_up_to_power_of_two
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import checks

_MAX_WINDOW_LEN = 1024  # maximum number of tokens of each prompt in one call of the model


def unpad_prompts(
  prompts: Array, lengths: Sequence[int] | Array | None, n_vocab: int
) -> list[np.ndarray]:
  """Checks the prompts of `generate` and removes their padding.

  Args:
    prompts: [B, P] integers in [0, X); P may be 0.
    lengths: [B] number of tokens of each prompt; the padding follows them. None: no padding.
    n_vocab: X.

  Returns:
    B arrays of int32, of the given lengths.

  Raises:
    ValueError: a shape is wrong, a length is not in [0, P], or a token is not in [0, X).
    TypeError: tokens or lengths are not integers.
  """
  prompts = _as_array("prompts", prompts)
  if prompts.dtype.kind in "US":
    raise TypeError(
      "generate: prompts must be integers, got text: pass it to continue_text or to "
      "LanguageModel.generate, or encode it with the vocabulary of the model."
    )
  if prompts.ndim != 2 or prompts.shape[0] == 0:
    raise ValueError(f"generate: prompts must be [B, P] with B >= 1, got shape {prompts.shape}.")
  B, P = prompts.shape
  lengths = np.full(B, P) if lengths is None else _as_array("lengths", lengths)
  if not np.issubdtype(lengths.dtype, np.integer):
    raise TypeError(f"generate: lengths must be integers, got {lengths.dtype}.")
  if lengths.shape != (B,) or not ((0 <= lengths) & (lengths <= P)).all():
    raise ValueError(
      f"generate: lengths={lengths.tolist()} must be one integer in [0, {P}] for each of {B} "
      "prompts."
    )
  if P:
    try:
      checks.check_tokens(prompts, n_vocab)
    except (TypeError, ValueError) as error:
      raise type(error)(f"generate: prompts: {error}") from None
  return [row[:n].astype(np.int32) for row, n in zip(prompts, lengths, strict=True)]


def _as_array(name: str, values: Any) -> np.ndarray:
  """Returns an argument of `generate` as an array; raises if lists have unequal lengths."""
  try:
    return np.asarray(values)
  except ValueError:
    raise ValueError(
      f"generate: {name} has rows of different lengths: pad the prompts at their ends to [B, P], "
      "and pass their lengths as `lengths`."
    ) from None


def fill_empty_prompts(
  prompts: Sequence[np.ndarray], state: transformer.TransformerState, eos_ids: Sequence[int]
) -> list[np.ndarray]:
  """Replaces each empty prompt by the first eos token, which starts a new text.

  Args:
    prompts: B arrays of int32 tokens.
    state: the state that the prompts continue.
    eos_ids: see `generate`; may be empty.

  Returns:
    B arrays of at least one token.

  Raises:
    ValueError: a prompt is empty, and it continues a text or there is no eos token.
  """
  is_new = np.asarray(state.document) < 0
  for b, prompt in enumerate(prompts):
    if prompt.size == 0 and not is_new[b]:
      raise ValueError(
        f"generate: prompts[{b}] is empty, so the logits of its next token are unknown: pass the "
        "`logits` that came with `state`."
      )
    if prompt.size == 0 and not eos_ids:
      raise ValueError(f"generate: prompts[{b}] is empty: pass an `eos_id` to start the text with.")
  return [prompt if prompt.size else np.array(eos_ids[:1], np.int32) for prompt in prompts]


def prefill(
  params: Params,
  config: TransformerConfig,
  prompts: Sequence[np.ndarray],
  state: transformer.TransformerState,
  logits: Array | None = None,
) -> tuple[transformer.TransformerState, Array]:
  """Reads prompts of any lengths, one window at a time.

  Args:
    params: parameters of the model.
    config: configuration of the model.
    prompts: B arrays of int32 tokens; an empty one leaves its batch element unchanged.
    state: the state that the prompts continue.
    logits: [B, X] of the next token after `state`, which are returned for empty prompts. None:
      zeros.

  Returns:
    The state after the prompts, and the logits [B, X] f32 of the token after each prompt.
  """
  B = len(prompts)
  if logits is None:
    logits = jnp.zeros((B, config.n_vocab), jnp.float32)
  logits = jnp.asarray(logits, jnp.float32)
  chex.assert_shape((state.document, logits), [(B,), (B, config.n_vocab)])
  lengths = np.array([len(prompt) for prompt in prompts])
  longest = int(lengths.max())
  T = min(_MAX_WINDOW_LEN, round_up_to_power_of_two(longest))
  for start in range(0, longest, T):
    window = np.zeros((B, T), np.int32)
    window_lengths = np.clip(lengths - start, 0, T)
    for b, prompt in enumerate(prompts):
      window[b, : window_lengths[b]] = prompt[start : start + T]
    state, logits = _read_window(params, config, window, window_lengths, state, logits)
  return state, logits


@functools.partial(jax.jit, static_argnames="config")
def _read_window(
  params: Params,
  config: TransformerConfig,
  tokens: Array,
  lengths: Array,
  state: transformer.TransformerState,
  logits: Array,
) -> tuple[transformer.TransformerState, Array]:
  """Reads the first `lengths[b]` tokens of each `tokens[b]`, [B, T]; see `prefill`."""
  B, T = tokens.shape
  chex.assert_shape(lengths, (B,))
  is_token = jnp.arange(T) < lengths[:, None]
  document = jnp.maximum(state.document, 0)[:, None]
  out = transformer.make_transformer(config).apply(
    params, None, tokens, state, doc_ids=jnp.where(is_token, document, NO_DOCUMENT)
  )
  last = jnp.maximum(lengths - 1, 0)[:, None, None]
  last_logits = jnp.take_along_axis(out.logits, last, axis=1)[:, 0]
  return out.state, jnp.where((lengths > 0)[:, None], last_logits, logits)
