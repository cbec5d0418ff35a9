"""Writes text, or images, from a checkpoint.

python -m experiments.sample --checkpoint=runs/quickstart --prompt='The Admiral '
python -m experiments.sample --checkpoint=runs/quickstart --prompt='The Admiral ' --stream
python -m experiments.sample --checkpoint=runs/quickstart --interactive
"""

from __future__ import annotations

import os
import sys

from absl import flags
import jax
import numpy as np

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.run import trainer
from tvq_haiku.utils import files

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of a run.", required=True)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [""], "Text to go on from; may be given several times."
)
_LENGTH = flags.DEFINE_integer("length", 500, "Bytes to write, at most.", lower_bound=1)
_STOP = flags.DEFINE_multi_string("stop", [], "Text at which to end; may be given several times.")
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "0 takes the likeliest byte.", lower_bound=0.0
)
_TOP_P = flags.DEFINE_float(
  "top_p", 0.95, "Nucleus of the likeliest bytes.", lower_bound=1e-9, upper_bound=1.0
)
_TOP_K = flags.DEFINE_integer(
  "top_k", None, "Draws from so many of the likeliest bytes.", lower_bound=1
)
_MIN_P = flags.DEFINE_float(
  "min_p",
  None,
  "Draws from bytes with this share of the greatest probability.",
  lower_bound=0.0,
  upper_bound=1.0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Another seed, another text.", lower_bound=0)
_STREAM = flags.DEFINE_boolean("stream", False, "Print the text while it is written.")
_INTERACTIVE = flags.DEFINE_boolean(
  "interactive", False, "Read prompts line by line, each going on from all before; Ctrl-D ends."
)
_PNG = flags.DEFINE_string("png", None, "Write images instead, as a grid in this file.")
_IMAGES = flags.DEFINE_integer("images", 4, "How many images.", lower_bound=1)
_IMAGE_SIZE = flags.DEFINE_integer(
  "image_size", 64, "Their height and width in pixels.", lower_bound=1
)

_SHORT = 2000  # bytes, which need no progress bar


def main() -> None:
  if sum([_STREAM.value, _INTERACTIVE.value, _PNG.value is not None]) > 1:
    raise ValueError("--stream, --interactive and --png exclude each other.")
  run = tvq.load_checkpoint(_CHECKPOINT.value)
  data.ByteVocabulary.check(f"--checkpoint={_CHECKPOINT.value}", run.config.n_vocab)
  rng = jax.random.key(_SEED.value)
  model = (run.train_state.params, run.config)
  settings = dict(
    temperature=_TEMPERATURE.value, top_p=_TOP_P.value, top_k=_TOP_K.value, min_p=_MIN_P.value
  )
  # Bytes as they came from the command line, whether they are UTF-8 or not.
  prompts = [os.fsencode(prompt) for prompt in _PROMPT.value]
  stop = [os.fsencode(text) for text in _STOP.value]
  if _PNG.value:
    _draw(model, rng, settings)
  elif _INTERACTIVE.value:
    _talk(tvq.Conversation(*model, rng=rng, **settings), stop)
  elif _STREAM.value:
    for prompt in prompts:
      _say(prompt.decode(errors="replace"))
      pieces = tvq.Conversation(*model, rng=rng, **settings).write(
        prompt, max_new_tokens=_LENGTH.value, stop=stop
      )
      for piece in pieces:
        _say(piece)
      _say("\n")
  else:
    texts = tvq.continue_text(
      *model,
      prompts,
      max_new_tokens=_LENGTH.value,
      rng=rng,
      stop=stop,
      show_progress=_LENGTH.value > _SHORT,
      **settings,
    )
    for prompt, text in zip(prompts, texts):
      print(prompt.decode(errors="replace") + text)


def _say(text: str) -> None:
  print(text, end="", flush=True)


def _talk(conversation: tvq.Conversation, stop: list[bytes]) -> None:
  """Prompts from standard input; Ctrl-C breaks a reply off, and at the prompt it ends."""
  while True:
    _say("> " if sys.stdin.isatty() else "")
    line = sys.stdin.buffer.readline()
    if not line:
      return
    with trainer.stop_on_signals() as interrupted:
      for piece in conversation.write(line.rstrip(b"\n"), max_new_tokens=_LENGTH.value, stop=stop):
        _say(piece)
        if interrupted:
          break
    _say("\n")


def _draw(model: tuple, rng: jax.Array, settings: dict) -> None:
  size, n = _IMAGE_SIZE.value, _IMAGES.value
  files.prepare_directory(os.path.dirname(os.path.abspath(_PNG.value)))
  start = np.full((n, 1), data.ByteVocabulary.EOS, np.int32)
  out = tvq.generate(
    *model, start, max_new_tokens=3 * size * size, rng=rng, show_progress=True, **settings
  )
  images = tvq.images_from_tokens(np.asarray(out.tokens), height=size, width=size)
  tvq.image_grid(images).save(_PNG.value)
  print(f"{n} images of {size} x {size} pixels: {_PNG.value}")


if __name__ == "__main__":
  launcher.launch("sample", main)
