"""Conversations: a model's state is kept between prompts, and its text is streamed in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data import vocabulary as vocabulary_lib
from tvq_haiku.data.vocabulary import ByteVocabulary, Vocabulary
from tvq_haiku.generation import decoder, decoder_weights, prefill, sample_loop, sampling, stopping
from tvq_haiku.generation.text_stream import TextStream
from tvq_haiku.model import preconditions, transformer
from tvq_haiku.model import state as state_lib
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import checks, value_checks

_CHUNK_LEN = 16  # maximum number of tokens that are sampled for one chunk of text


class Conversation:
  """A conversation with a model of text, whose state is kept between prompts.

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
    vocabulary: Vocabulary = ByteVocabulary,
    state: transformer.TransformerState | None = None,
    logits: Array | None = None,
    pending: bytes = b"",
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
  ):
    """Checks the arguments and prepares the weights.

    Args:
      params: parameters of `make_transformer(config)`.
      config: configuration of the model.
      rng: one key, into which each prompt is folded.
      vocabulary: vocabulary of the model.
      state: the state that the first prompt continues; B = 1. None, or the initial state: the
        prompt starts a new text.
      logits: [1, X]: `logits` that came with `state`, required if the first prompt is empty.
      pending: `pending` that came with `state`.
      temperature: as in `generate`.
      top_p: as in `generate`.
      top_k: as in `generate`.
      min_p: as in `generate`.

    Raises:
      ValueError: an argument has a wrong value; the message names it.
      TypeError: an argument has a wrong type; the message names it.
    """
    preconditions.check_language_model("Conversation", params, config)
    vocabulary_lib.check_vocabulary("Conversation", vocabulary, config.n_vocab)
    if state is not None:
      state_lib.check_state(state, config, 1)
    arrays = {"logits": (logits, (("1", 1), "X"), jnp.floating)}
    checks.check_arrays("Conversation", chex.Dimensions(X=config.n_vocab), **arrays)
    self._sampling = sampling.make_sampling_params(
      temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, caller="Conversation"
    )
    self._rng = value_checks.check_key("Conversation", rng)
    sampling.example_rngs(self._rng, [np.array([])], caller="Conversation")  # checks the shape
    self._params, self._config, self._vocabulary = params, config, vocabulary
    self._weights = decoder_weights.prepare_weights(params, config)
    self._generation: sample_loop.GenerationState | None = None  # None: no prompt has been read
    # What the first prompt continues.
    self._first_state = transformer.initial_state(config, 1) if state is None else state
    self._first_logits = logits
    pending = value_checks.check_text("Conversation", "pending", pending)
    self._text = TextStream(vocabulary, (), pending=pending)

  @property
  def state(self) -> transformer.TransformerState:
    """State of the model after all text that it has read and written; B = 1."""
    if self._generation is None:
      return self._first_state
    return decoder.finish_decoding(self._generation.decode_state)

  @property
  def logits(self) -> Array | None:
    """Logits [1, X] of the token after `state`; None if they are unknown."""
    return self._first_logits if self._generation is None else self._generation.logits

  @property
  def pending(self) -> bytes:
    """Bytes that were written, but not yielded, because they are a part of a character.

    The next call of `write` continues the character, if its prompt is empty.
    """
    return self._text.pending

  def write(
    self, prompt: str | bytes = "", *, max_new_tokens: int, stop: Sequence[str | bytes] = ()
  ) -> Iterator[str]:
    """Reads the prompt and yields the model's text in chunks, as it is sampled.

    Joined, the chunks are the text that `continue_text` returns for the same prompt and key. But if
    `max_new_tokens` ends the text inside of a character, its bytes wait for the next call, which
    yields the complete character if its prompt is empty, and drops them otherwise. A caller may
    drop the iterator before its end. Then the conversation continues after the last sampled token,
    which may be a few tokens after the last chunk. If the model ends its text with an eos, the next
    prompt starts a new text.

    Args:
      prompt: text or bytes. May be empty, unless it is the first one and continues a `state`
        without `logits`.
      max_new_tokens: maximum number of tokens to sample.
      stop: stop texts: the text ends before the first of them. The state includes the stop text.

    Returns:
      An iterator of non-empty texts.

    Raises:
      ValueError: an argument has a wrong value; the message names it.
      TypeError: an argument has a wrong type; the message names it.
    """
    max_new_tokens = value_checks.check_integer("Conversation", "max_new_tokens", max_new_tokens)
    prompt = value_checks.check_text("Conversation", "prompt", prompt)
    stop_texts = stopping.check_stop_texts("Conversation", stop)
    if not prompt and self.logits is None and not self._is_new_text():
      raise ValueError(
        "Conversation: the first prompt must not be empty if a `state` was given without `logits`."
      )
    tokens = vocabulary_lib.encode_text("Conversation", "prompt", self._vocabulary, prompt)
    return self._write(tokens, max_new_tokens, stop_texts)

  def _is_new_text(self) -> bool:
    return self._generation is None and bool(self._first_state.document[0] < 0)

  def _write(
    self, prompt: np.ndarray, max_new_tokens: int, stop_texts: Sequence[bytes]
  ) -> Iterator[str]:
    """Yields the chunks of `write`; `prompt` holds its tokens."""
    vocabulary = self._vocabulary
    self._text = TextStream(vocabulary, stop_texts, pending=b"" if prompt.size else self.pending)
    if self._is_new_text():
      prompt = np.append(vocabulary.EOS, prompt).astype(np.int32)
    state, logits = prefill.prefill(self._params, self._config, [prompt], self.state, self.logits)
    stop = stopping.make_stop_conditions(
      [[vocabulary.EOS], *stopping.encode_stop_texts(vocabulary, stop_texts)]
    )
    self._generation = sample_loop.start_generation(self._config, state, logits, stop)
    rngs = sampling.example_rngs(self._rng, [prompt], caller="Conversation")
    n_left, has_ended = max_new_tokens, False
    while n_left > 0 and not has_ended:
      tokens = self._sample(rngs, min(n_left, _CHUNK_LEN), stop)
      n_left -= len(tokens)
      has_ended = self._text.is_stopped or bool(self._generation.ended[0])
      if has_ended or n_left == 0:
        self._text.release(is_end=has_ended)
      if tokens[-1] == vocabulary.EOS:  # the next prompt starts a new text
        self._generation, self._first_logits = None, None
        self._first_state = transformer.initial_state(self._config, 1)
      if chunk := self._text.take():
        yield chunk

  def _sample(self, rngs: Array, limit: int, stop: stopping.StopConditions) -> list[int]:
    """Samples and reads at most `limit` tokens, and returns them."""

    def sample(n: int) -> list[int]:
      sampled, self._generation = sample_loop.sample_tokens(
        self._weights,
        self._config,
        self._generation,
        rngs,
        self._sampling,
        n,
        chunk_len=_CHUNK_LEN,
        stop=stop,
      )
      return np.asarray(sampled.tokens)[0, : int(sampled.lengths[0])].tolist()

    if self._vocabulary is ByteVocabulary or not self._text.stop_texts:
      # Sampling ends at the last byte of a stop text.
      tokens = sample(limit)
      self._text.read(tokens)
      return tokens
    # A stop text may be written in other tokens than those in `stop`. Then the same tokens are
    # sampled once more, but only up to the last one of the stop text.
    before = jax.tree.map(jnp.copy, self._generation)  # `sample_tokens` donates its argument
    tokens = sample(limit)
    n_read = self._text.read(tokens)
    if n_read < len(tokens):
      self._generation = before
      return sample(n_read)
    return tokens
