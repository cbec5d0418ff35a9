"""One text that grows from both sides: what is fed to the model, and what it writes, piece by piece."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.generation import decoder as decoder_lib
from tvq_haiku.generation import generate as generate_lib
from tvq_haiku.generation import sampling
from tvq_haiku.model import transformer
from tvq_haiku.types import Array
from tvq_haiku.utils import checks

_CHUNK = 16  # tokens drawn between two pieces


class Conversation:
  """A byte-level model's state, kept between prompts.

  >>> import jax
  >>> import numpy as np
  >>> config = TransformerConfig.tiny()
  >>> params = transformer.make_transformer(config).init(
  ...     jax.random.key(0), np.ones((1, 1), np.int32), transformer.initial_state(config, 1))
  >>> talk = Conversation(params, config, rng=jax.random.key(1), temperature=0.8)
  >>> for piece in talk.write("It was ", max_new_tokens=20):
  ...   pass  # print(piece, end="", flush=True)
  >>> text = "".join(talk.write("A second prompt goes on from there. ", max_new_tokens=20))
  """

  def __init__(
    self,
    params: Any,
    config: TransformerConfig,
    *,
    rng: Array,
    state: transformer.TransformerState | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
  ):
    """Args are those of `generate`; `state` is of one row, and needs a prompt that is not empty."""
    ByteVocabulary.check("Conversation", config.n_vocab)
    if not config.causal:
      raise ValueError("Conversation: causal=False: an encoder does not continue a text.")
    transformer.check_params(params, config)
    if state is not None:
      checks.check_state(state, transformer.initial_state, config, 1)
    self._sampling = sampling.make_sampling_params(
      temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p
    )
    self._params, self._config, self._rng = params, config, rng
    self._weights = decoder_lib.prepare_weights(config, params)
    self._state, self._logits = state, None
    self._now: generate_lib.GenerationState | None = None

  @property
  def state(self) -> transformer.TransformerState:
    """After all that was read and written so far."""
    if self._now is not None:
      return decoder_lib.finish_decoding(self._now.state)
    return transformer.initial_state(self._config, 1) if self._state is None else self._state

  def write(
    self, prompt: str | bytes = "", *, max_new_tokens: int, stop: Sequence[str | bytes] = ()
  ) -> Iterator[str]:
    """Reads the prompt and yields what follows, in pieces, as it is drawn.

    The pieces together are what `continue_text` returns for the same prompt and key. An iterator
    that is dropped half-way leaves the conversation where the last piece ended, or a little after
    it. When the model ends its text (by an eos), the next prompt begins a new one.

    Args:
      prompt: text, or bytes.
      max_new_tokens: bytes to write, at most.
      stop: texts, at each of which writing ends; they are read, but not yielded.
    """
    if max_new_tokens < 1:
      raise ValueError(f"Conversation: max_new_tokens={max_new_tokens} must be at least 1.")
    endings = [ByteVocabulary.encode(text).tolist() for text in stop]
    if not all(endings):
      raise ValueError("Conversation: stop: a stop text must not be empty.")
    return self._write(ByteVocabulary.encode(prompt), max_new_tokens, endings)

  def _write(
    self, prompt: np.ndarray, max_new_tokens: int, endings: list[list[int]]
  ) -> Iterator[str]:
    state, logits = self.state, self._logits if self._now is None else self._now.logits
    if logits is None and self._state is None:  # nothing has been read
      prompt = np.append(ByteVocabulary.EOS, prompt).astype(np.int32)
    if not prompt.size and logits is None:
      raise ValueError("Conversation: prompt: it must not be empty after a given state.")
    keys = sampling.example_rngs(self._rng, [prompt])
    self._state, self._logits = generate_lib.prefill(
      self._params, self._config, [prompt], state, logits
    )
    stop = tuple(map(tuple, endings))
    self._now = generate_lib.start_generation(self._config, self._state, self._logits, stop=stop)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pending: list[int] = []
    left, ended = max_new_tokens, False
    while left > 0 and not ended:
      drawn, self._now = generate_lib.sample_tokens(
        self._config,
        self._weights,
        self._now,
        keys,
        self._sampling,
        min(left, _CHUNK),
        n=_CHUNK,
        eos_id=ByteVocabulary.EOS,
        stop=stop,
      )
      new = np.asarray(drawn.tokens)[0, : int(drawn.lengths[0])].tolist()
      left, ended = left - len(new), bool(self._now.ended[0])
      pending += new
      if ended:
        if pending[-1] == ByteVocabulary.EOS:
          self._now = self._state = self._logits = None
        else:
          matched = max(len(s) for s in endings if pending[-len(s) :] == s)
          pending = pending[: len(pending) - matched]
      held = 0 if ended or left == 0 else _held_back(pending, endings)
      ready, pending = pending[: len(pending) - held], pending[len(pending) - held :]
      piece = decoder.decode(ByteVocabulary.decode(ready), final=ended or left == 0)
      if piece:
        yield piece


def _held_back(tokens: list[int], endings: Sequence[list[int]]) -> int:
  """How many of the last tokens may turn out to be the beginning of an ending.

  >>> _held_back([5, 1, 2], [[1, 2, 3], [2, 9]])
  2
  """
  return max((n for s in endings for n in range(1, len(s)) if tokens[-n:] == s[:n]), default=0)
