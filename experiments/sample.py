"""Samples text or images from a byte-level model.

python -m experiments.sample --checkpoint=runs/quickstart --prompt='The Admiral '
python -m experiments.sample --checkpoint=runs/quickstart --prompt='The Admiral ' --stream
python -m experiments.sample --checkpoint=runs/quickstart --interactive
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from collections.abc import Sequence
import os
import sys

from absl import flags
import jax
import numpy as np

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.run import stop_signals
from tvq_haiku.types import Params
from tvq_haiku.utils import files

_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Directory of the training run.", required=True
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [""], "Text to continue. Repeat the flag for several prompts."
)
_LENGTH = flags.DEFINE_integer("length", 500, "Maximum number of bytes to sample.", lower_bound=1)
_STOP = flags.DEFINE_multi_string(
  "stop", [], "Text that ends the sample; it is not printed. Repeat the flag for several texts."
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature",
  0.8,
  "Sampling temperature. 0 always takes the most likely byte.",
  lower_bound=0.0,
)
_TOP_P = flags.DEFINE_float(
  "top_p",
  0.95,
  "Sample from the smallest set of most likely bytes whose probabilities sum to at least this.",
  lower_bound=1e-9,
  upper_bound=1.0,
)
_TOP_K = flags.DEFINE_integer(
  "top_k", None, "Number of most likely bytes to sample from. Default: all.", lower_bound=1
)
_MIN_P = flags.DEFINE_float(
  "min_p",
  None,
  "Sample from the bytes whose probability is at least this fraction of the largest one. Default: "
  "all.",
  lower_bound=0.0,
  upper_bound=1.0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0)
_STREAM = flags.DEFINE_boolean("stream", False, "Print the text while it is sampled.")
_INTERACTIVE = flags.DEFINE_boolean(
  "interactive",
  False,
  "Read prompts from standard input, line by line. Each continues the conversation so far. Ctrl-C "
  "interrupts a reply, Ctrl-D ends the conversation.",
)
_PNG = flags.DEFINE_string(
  "png", None, "Sample images instead of text, and write them as a grid to this file."
)
_IMAGES = flags.DEFINE_integer("images", 4, "Number of images to sample.", lower_bound=1)
_IMAGE_SIZE = flags.DEFINE_integer(
  "image_size", 64, "Height and width of an image in pixels.", lower_bound=1
)

_LONG_TEXT = 2000  # bytes; a progress bar is shown if --length is larger

Model = tuple[Params, tvq.TransformerConfig]


def main() -> None:
  """Samples images, or text in one of three ways: at once, streamed, or interactively."""
  if sum([_STREAM.value, _INTERACTIVE.value, _PNG.value is not None]) > 1:
    raise ValueError("--stream, --interactive and --png exclude each other: set at most one.")
  run = tvq.load_checkpoint(_CHECKPOINT.value)
  data.ByteVocabulary.check(f"--checkpoint={_CHECKPOINT.value}", run.config.n_vocab)
  model = (run.train_state.params, run.config)
  settings = dict(
    rng=jax.random.key(_SEED.value),
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
    top_k=_TOP_K.value,
    min_p=_MIN_P.value,
  )
  # Restores the bytes that were typed; they need not be valid UTF-8.
  prompts = [os.fsencode(prompt) for prompt in _PROMPT.value]
  stop, length = [os.fsencode(text) for text in _STOP.value], _LENGTH.value
  if _PNG.value:
    _write_images(model, _PNG.value, n_image=_IMAGES.value, size=_IMAGE_SIZE.value, **settings)
  elif _INTERACTIVE.value:
    _converse(tvq.Conversation(*model, **settings), length, stop)
  elif _STREAM.value:
    for prompt in prompts:
      _print_now(prompt.decode(errors="replace"))
      lm = tvq.LanguageModel(*model)
      for text in lm.stream(prompt, max_new_tokens=length, stop=stop, **settings):
        _print_now(text)
      _print_now("\n")
  else:
    show_progress = length > _LONG_TEXT
    texts = tvq.continue_text(
      *model, prompts, max_new_tokens=length, stop=stop, show_progress=show_progress, **settings
    )
    for prompt, text in zip(prompts, texts, strict=True):
      print(prompt.decode(errors="replace") + text)


def _print_now(text: str) -> None:
  print(text, end="", flush=True)


def _converse(conversation: tvq.Conversation, length: int, stop: Sequence[bytes]) -> None:
  """Replies to each line of standard input until it ends.

  Ctrl-C ends a reply; at the prompt, it ends the command.

  Args:
    conversation: the model and its state.
    length: maximum number of bytes of a reply.
    stop: texts at which a reply ends.
  """
  while True:
    _print_now("> " if sys.stdin.isatty() else "")
    line = sys.stdin.buffer.readline()
    if not line:
      return
    with stop_signals.stop_on_signals() as interrupted:
      for text in conversation.write(line.rstrip(b"\n"), max_new_tokens=length, stop=stop):
        _print_now(text)
        if interrupted:
          break
    _print_now("\n")


def _write_images(
  model: Model, file: str, *, n_image: int, size: int, **settings: float | jax.Array | None
) -> None:
  """Samples `n_image` images of `size` x `size` pixels and writes them as a grid to `file`."""
  files.prepare_directory(os.path.dirname(os.path.abspath(file)))
  start = np.full((n_image, 1), data.ByteVocabulary.EOS, np.int32)
  out = tvq.generate(*model, start, max_new_tokens=3 * size * size, show_progress=True, **settings)
  images = tvq.images_from_tokens(np.asarray(out.tokens), height=size, width=size)
  tvq.image_grid(images).save(file)
  print(f"{n_image} images of {size} x {size} pixels: {file}")


if __name__ == "__main__":
  launcher.launch("sample", main)
