"""Generation: continues prompts of token ids (`generate`) or of text (`continue_text`).

The prompts are read in windows. Then tokens are sampled one at a time in a compiled loop.

Letters: B batch, P prompt length, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data import vocabulary as vocabulary_lib
from tvq_haiku.data.vocabulary import ByteVocabulary, Vocabulary
from tvq_haiku.generation import decoder, decoder_weights, prefill, sample_loop, sampling, stopping
from tvq_haiku.model import preconditions, transformer
from tvq_haiku.model import state as state_lib
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import checks, value_checks


class GenerateOutput(NamedTuple):
  """Result of `generate`."""

  tokens: Array  # [B, max_new_tokens] int32; 0 after the end of a text
  # [B, max_new_tokens] f32: log-probabilities at temperature 1, without filters; 0 after the end
  logprobs: Array
  lengths: Array  # [B] int32: number of sampled tokens, including the eos or stop sequence
  state: transformer.TransformerState  # after the prompts and the sampled tokens
  logits: Array  # [B, X] f32: logits of the token after the sampled tokens


def generate(
  params: Params,
  config: TransformerConfig,
  prompts: npt.ArrayLike,
  *,
  max_new_tokens: int,
  rng: Array,
  lengths: Sequence[int] | Array | None = None,
  temperature: float = 1.0,
  top_p: float = 1.0,
  top_k: int | None = None,
  min_p: float | None = None,
  eos_id: int | Sequence[int] | None = None,
  stop: Sequence[Sequence[int]] = (),
  state: transformer.TransformerState | None = None,
  logits: Array | None = None,
  show_progress: bool = False,
) -> GenerateOutput:
  """Continues each prompt of a batch.

  The result for a prompt does not depend on the rest of the batch, except that matrix products of
  different shapes round differently. Memory does not depend on the length of prompt or text. The
  function compiles its own steps, so it cannot be called inside `jax.jit`.

  Args:
    params: parameters of `make_transformer(config)`.
    config: configuration of the model.
    prompts: [B, P] integers in [0, X); P may be 0.
    max_new_tokens: maximum number of tokens to sample for each prompt.
    rng: one key, into which each prompt is folded, so that a text does not depend on the rest of
      the batch (equal prompts in a batch continue differently); or [B] keys, one for each prompt.
      The number of tokens before a token is folded into its key.
    lengths: [B] integers: number of tokens of each prompt; the padding follows them. None: P each.
    temperature: divides the logits; 0 takes the most probable token.
    top_p: samples from the smallest set of most probable tokens whose probabilities add up to at
      least this number; 1 disables the filter.
    top_k: samples from this number of most probable tokens.
    min_p: samples from tokens whose probability is at least this fraction of the highest one.
    eos_id: token that ends a text, or several such tokens. The first of them also starts a text
      whose prompt is empty.
    stop: sequences of tokens; a text ends when one of them has been sampled completely. `stop` and
      `eos_id` are stored in one array, whose size is rounded up to powers of two, at least 4
      sequences of 8 tokens. Other values recompile only if this size changes.
    state: the state that the prompts continue, such as `state` of an earlier output. None: each
      prompt starts a new document.
    logits: [B, X]: `logits` of the same output, required if an empty prompt continues a text.
    show_progress: reports progress on standard error.

  Returns:
    The sampled tokens with their log-probabilities, and the state and logits to continue from.

  Raises:
    ValueError: an argument has a wrong shape or value; the message names it.
    TypeError: an argument has a wrong type or dtype; the message names it. Or the function is
      called inside of a transformation such as `jax.jit`.

  >>> import jax
  >>> config = TransformerConfig.tiny()
  >>> model = transformer.make_transformer(config)
  >>> params = model.init(jax.random.key(0), jnp.ones((1, 1), jnp.int32))
  >>> out = generate(params, config, np.array([[5, 6, 7]]), max_new_tokens=4, rng=jax.random.key(1))
  >>> out.tokens.shape, out.lengths.tolist(), out.state.position.tolist()
  ((1, 4), [4], [7])
  """
  arguments = (prompts, lengths, rng, state, logits, temperature, top_p, top_k, min_p, eos_id, stop)
  value_checks.check_not_traced("generate", arguments)
  preconditions.check_language_model("generate", params, config)
  sampling_params = sampling.make_sampling_params(
    temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, caller="generate"
  )
  max_new_tokens = value_checks.check_integer("generate", "max_new_tokens", max_new_tokens)
  eos_ids = stopping.check_eos_ids("generate", eos_id, config.n_vocab)
  sequences = stopping.check_stop_sequences("generate", stop, config.n_vocab)
  prompt_list = prefill.unpad_prompts(prompts, lengths, config.n_vocab)
  rngs = sampling.example_rngs(rng, prompt_list, caller="generate")
  B, X = len(prompt_list), config.n_vocab
  if state is not None:
    state_lib.check_state(state, config, B)
  checks.check_arrays("generate", chex.Dimensions(B=B, X=X), logits=(logits, "BX", jnp.floating))
  state = transformer.initial_state(config, B) if state is None else state
  if logits is None:
    prompt_list = prefill.fill_empty_prompts(prompt_list, state, eos_ids)
  state, logits = prefill.prefill(params, config, prompt_list, state, logits)
  conditions = stopping.make_stop_conditions([*([token] for token in eos_ids), *sequences])
  sampled, generation = sample_loop.sample_in_chunks(
    decoder_weights.prepare_weights(params, config),
    config,
    sample_loop.start_generation(config, state, logits, conditions),
    rngs,
    sampling_params,
    max_new_tokens=max_new_tokens,
    stop=conditions,
    show_progress=show_progress,
  )
  state = decoder.finish_decoding(generation.decode_state)
  return GenerateOutput(**sampled._asdict(), state=state, logits=generation.logits)


def continue_text(
  params: Params,
  config: TransformerConfig,
  prompts: Sequence[str | bytes],
  *,
  max_new_tokens: int,
  rng: Array,
  stop: Sequence[str | bytes] = (),
  vocabulary: Vocabulary = ByteVocabulary,
  **settings: Any,
) -> list[str]:
  """Continues each prompt with text.

  Args:
    params: parameters of `make_transformer(config)`.
    config: configuration of the model.
    prompts: at least one text, each of any length.
    max_new_tokens: maximum number of tokens (bytes, for the byte vocabulary) to sample for each
      prompt.
    rng: one key or [B] keys, as in `generate`.
    stop: stop texts: a text ends before the first of them. With a vocabulary of subwords, tokens
      may be sampled after a stop text that the model writes with other tokens than those of
      `vocabulary.encode`; they are removed.
    vocabulary: vocabulary of the model.
    **settings: `temperature`, `top_p`, `top_k`, `min_p` and `show_progress` of `generate`.

  Returns:
    For each prompt, the text after it. Bytes that are not UTF-8 become replacement characters.

  Raises:
    ValueError: an argument has a wrong value, or the vocabulary is not that of the model; the
      message names it.
    TypeError: an argument has a wrong type; the message names it.
  """
  preconditions.check_language_model("continue_text", params, config)
  vocabulary_lib.check_vocabulary("continue_text", vocabulary, config.n_vocab)
  texts = value_checks.check_texts("continue_text", "prompts", prompts)
  if not texts:
    raise ValueError("continue_text: prompts must be a list of at least one text, got none.")
  stop_texts = stopping.check_stop_texts("continue_text", stop)
  encoded = [
    vocabulary_lib.encode_text("continue_text", f"prompts[{i}]", vocabulary, text)
    for i, text in enumerate(texts)
  ]
  padded, lengths = _pad([np.append(vocabulary.EOS, tokens) for tokens in encoded])
  out = generate(
    params,
    config,
    padded,
    lengths=lengths,
    max_new_tokens=max_new_tokens,
    rng=rng,
    eos_id=vocabulary.EOS,
    stop=stopping.encode_stop_texts(vocabulary, stop_texts),
    **settings,
  )
  continuations = []
  for row, n in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True):
    raw = vocabulary.decode(row[:n])
    end, _ = stopping.find_stop_text(raw, stop_texts)
    continuations.append(raw[:end].decode(errors="replace"))
  return continuations


def _pad(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts of any lengths as one array [B, P] int32, and their lengths [B]."""
  lengths = np.array([len(prompt) for prompt in prompts])
  padded = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(padded, prompts, strict=True):
    row[: len(prompt)] = prompt
  return padded, lengths
