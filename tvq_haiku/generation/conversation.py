"""Conversations: a model's state is kept between prompts, and its text is streamed in chunks."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.generation import decoder, decoder_weights, prefill, sample_loop, sampling, stopping
from tvq_haiku.model import state as state_lib
from tvq_haiku.model import transformer
from tvq_haiku.types import Array, Params

_CHUNK_LEN = 16  # maximum number of tokens that are sampled for one chunk of text


class Conversation:
  """A conversation with a byte-level model, whose state is kept between prompts.

  >>> import jax
  >>> config = TransformerConfig.tiny()
  >>> model = transformer.make_transformer(config)
  >>> params = model.init(jax.random.key(0), np.ones((1, 1), np.int32))
  >>> conversation = Conversation(params, config, rng=jax.random.key(1), temperature=0.8)
  >>> for chunk in conversation.write("It was ", max_new_tokens=20):
  ...   pass  # print(chunk, end="", flush=True)
  >>> text = "".join(conversation.write("A second prompt continues. ", max_new_tokens=20))
  """

  def __init__(
    self,
    params: Params,
    config: TransformerConfig,
    *,
    rng: Array,
    state: transformer.TransformerState | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
  ):
    """Checks the arguments and prepares the weights.

    Args:
      params: parameters of `make_transformer(config)`.
      config: configuration of the model, which must have the byte vocabulary.
      rng: one key, into which each prompt is folded.
      state: the state that the first prompt continues; B = 1. None: the prompt starts a new text.
      temperature: as in `generate`.
      top_p: as in `generate`.
      top_k: as in `generate`.
      min_p: as in `generate`.

    Raises:
      ValueError: an argument has a wrong value; the message names it.
    """
    ByteVocabulary.check("Conversation", config.n_vocab)
    if not config.causal:
      raise ValueError("Conversation: causal=False: an encoder does not continue a text.")
    transformer.check_params(params, config)
    if state is not None:
      state_lib.check_state(state, config, 1)
    self._sampling = sampling.make_sampling_params(
      temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, caller="Conversation"
    )
    self._params, self._config, self._rng = params, config, rng
    self._weights = decoder_weights.prepare_weights(params, config)
    self._initial_state = state  # None: the next prompt starts a new text
    self._generation: sample_loop.GenerationState | None = None  # None: no prompt has been read

  @property
  def state(self) -> transformer.TransformerState:
    """State of the model after all text that it has read and written; B = 1."""
    if self._generation is not None:
      return decoder.finish_decoding(self._generation.decode_state)
    if self._initial_state is not None:
      return self._initial_state
    return transformer.initial_state(self._config, 1)

  def write(
    self, prompt: str | bytes = "", *, max_new_tokens: int, stop: Sequence[str | bytes] = ()
  ) -> Iterator[str]:
    """Reads the prompt and yields the model's text in chunks, as it is sampled.

    Joined, the chunks are the text that `continue_text` returns for the same prompt and key. A
    caller may drop the iterator before its end. Then the conversation continues after the last
    sampled token, which may be a few tokens after the last chunk. If the model ends its text with
    an eos, the next prompt starts a new text.

    Args:
      prompt: text or UTF-8 bytes. May be empty, unless it is the first one and continues a `state`.
      max_new_tokens: maximum number of bytes to sample.
      stop: stop texts: the text ends before the first of them. The state includes the stop text.

    Returns:
      An iterator of non-empty texts. It raises a ValueError if the prompt is empty, is the first
      one, and continues the `state` that was given to the constructor.

    Raises:
      ValueError: an argument has a wrong value; the message names it.
    """
    if max_new_tokens < 1:
      raise ValueError(f"Conversation: max_new_tokens={max_new_tokens} must be at least 1.")
    stop_texts = list(stop)
    if not all(stop_texts):
      raise ValueError(f"Conversation: stop={stop_texts!r}: a stop text must not be empty.")
    sequences = [ByteVocabulary.encode(text) for text in stop_texts]
    conditions = stopping.make_stop_conditions(ByteVocabulary.EOS, sequences)
    return self._write(ByteVocabulary.encode(prompt), max_new_tokens, conditions)

  def _write(
    self, prompt: np.ndarray, max_new_tokens: int, stop: stopping.StopConditions
  ) -> Iterator[str]:
    """Yields the chunks of `write`."""
    if self._generation is None and self._initial_state is None:
      prompt = np.append(ByteVocabulary.EOS, prompt).astype(np.int32)
    self._read_prompt(prompt, stop)
    rngs = sampling.example_rngs(self._rng, [prompt])
    text = _TextStream(stop.sequences)
    n_left, ended = max_new_tokens, False
    while n_left > 0 and not ended:
      sampled, self._generation = sample_loop.sample_tokens(
        self._weights,
        self._config,
        self._generation,
        rngs,
        self._sampling,
        min(n_left, _CHUNK_LEN),
        chunk_len=_CHUNK_LEN,
        stop=stop,
      )
      tokens = np.asarray(sampled.tokens)[0, : int(sampled.lengths[0])].tolist()
      n_left, ended = n_left - len(tokens), bool(self._generation.ended[0])
      if ended and tokens[-1] == ByteVocabulary.EOS:
        self._generation = self._initial_state = None
      chunk = text.decode(tokens, is_last=ended or n_left == 0)
      if chunk:
        yield chunk

  def _read_prompt(self, prompt: np.ndarray, stop: stopping.StopConditions) -> None:
    """Reads the tokens [P] of a prompt, which follow all text so far."""
    logits = None if self._generation is None else self._generation.logits
    if not prompt.size and logits is None:
      raise ValueError("Conversation: the first prompt must not be empty if a `state` was given.")
    state, logits = prefill.prefill(self._params, self._config, [prompt], self.state, logits)
    self._generation = sample_loop.start_generation(self._config, state, logits, stop)


class _TextStream:
  """Decodes a stream of byte tokens to chunks of text that later tokens cannot change.

  It holds back tokens that may be the beginning of a stop sequence, and the bytes of an incomplete
  character.
  """

  def __init__(self, stop_sequences: Sequence[Sequence[int]]):
    self._stop_sequences = stop_sequences
    self._utf8_decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._held_back: list[int] = []

  def decode(self, tokens: list[int], *, is_last: bool) -> str:
    """Returns the text of all tokens that need not be held back.

    Args:
      tokens: the next tokens.
      is_last: no more tokens follow. A stop sequence at the end of the text is removed.

    Returns:
      The text, which may be empty.
    """
    tokens = self._held_back + tokens
    if is_last:
      n_ready = len(stopping.strip_stop_sequence(tokens, self._stop_sequences))
    else:
      n_ready = len(tokens) - stopping.partial_match_len(tokens, self._stop_sequences)
    self._held_back = tokens[n_ready:]
    return self._utf8_decoder.decode(ByteVocabulary.decode(tokens[:n_ready]), final=is_last)
