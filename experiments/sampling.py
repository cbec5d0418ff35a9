"""Samples text or images from the model of a run: `experiments.sample` and --command=sample."""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib
import sys
from typing import Any

from absl import flags
import jax

from experiments.open_run import OpenRun
from experiments.shared_flags import SampleFlags
import tvq_haiku as tvq
from tvq_haiku.run import samples, stop_signals
from tvq_haiku.utils import files, progress

_LONG_TEXT = 2000  # tokens; a progress bar is shown if --length is larger


def sample(run: OpenRun, options: SampleFlags, *, seed: int) -> None:
  """Samples images, or text in one of three ways: at once, streamed, or interactively.

  Texts are printed, and written to a new file in the directory samples/ of the run. Images are
  written to a file there, or to --png.

  Args:
    run: the run.
    options: the flags of sampling.
    seed: seed of the samples.

  Raises:
    ValidationError: flags contradict each other or the kind of the model.
  """
  size = options.image_size or run.record.image_size
  _check_flags(run, options, size)
  settings = dict(
    rng=jax.random.key(seed),
    temperature=options.temperature,
    top_p=run.record.top_p if options.top_p is None else options.top_p,
    top_k=options.top_k,
    min_p=options.min_p,
  )
  name = f"step-{run.n_update}-seed-{seed}"
  if size:
    _write_images(run, options, f"{name}.png", size, settings)
    return
  # Restores the bytes that were typed; they need not be valid UTF-8.
  prompts = [os.fsencode(prompt) for prompt in options.prompt]
  limits = dict(max_new_tokens=options.length, stop=[os.fsencode(text) for text in options.stop])
  with samples.TextFile(run.directory, f"{name}.txt") as file:
    if options.interactive:
      _converse(run.model.conversation(**settings), file, limits)
    elif options.stream:
      _stream(run.model, prompts, file, settings | limits)
    else:
      _print_texts(run.model, prompts, file, settings | limits)
    if file.path is not None:
      progress.log(f"written to {file.path}")


def _check_flags(run: OpenRun, options: SampleFlags, size: int | None) -> None:
  """Raises a ValidationError unless the flags fit each other and the kind of the model."""
  if options.stream and options.interactive:
    raise flags.ValidationError("--stream and --interactive exclude each other.")
  if size is None and options.png:
    raise flags.ValidationError(
      f"--png={options.png}: {run.directory} does not record that its model is one of images: if "
      "it is, set --image_size."
    )
  if size is None:
    return
  for name in ("prompt", "stop", "stream", "interactive"):
    value = getattr(options, name)
    if any(value) if isinstance(value, Sequence) else value:
      raise flags.ValidationError(
        f"--{name} is for models of text, but {run.directory} holds one of images."
      )


def _print_texts(
  model: tvq.LanguageModel, prompts: Sequence[bytes], file: samples.TextFile, settings: Any
) -> None:
  """Continues all prompts in one batch, and prints them with their continuations."""
  show_progress = settings["max_new_tokens"] > _LONG_TEXT
  texts = model.generate(prompts, show_progress=show_progress, **settings)
  for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
    _start_text(i, len(prompts), file)
    _print_now(prompt.decode(errors="replace") + text + "\n", file)


def _stream(
  model: tvq.LanguageModel, prompts: Sequence[bytes], file: samples.TextFile, settings: Any
) -> None:
  """Continues the prompts one after the other, and prints their text as it is sampled."""
  for i, prompt in enumerate(prompts):
    _start_text(i, len(prompts), file)
    _print_now(prompt.decode(errors="replace"), file)
    for chunk in model.stream(prompt, **settings):
      _print_now(chunk, file)
    _print_now("\n", file)


def _start_text(i: int, n: int, file: samples.TextFile) -> None:
  """Writes an empty line before text i of n, unless i is 0; a heading in the file, if n > 1."""
  if i > 0:
    _print_now("\n", file)
  if n > 1:
    file.write(f"--- {i} ---\n")


def _converse(conversation: tvq.Conversation, file: samples.TextFile, limits: Any) -> None:
  """Replies to each line of standard input until it ends.

  Ctrl-C ends a reply; at the prompt, it ends the command.

  Args:
    conversation: the model and its state.
    file: receives the lines, marked by ">", and the replies.
    limits: `max_new_tokens` and `stop` of a reply.
  """
  while True:
    if sys.stdin.isatty():
      print("> ", end="", flush=True)
    line = sys.stdin.buffer.readline()
    if not line:
      return
    file.write(f"> {line.decode(errors='replace').rstrip()}\n")
    with stop_signals.stop_on_signals() as interrupted:
      for chunk in conversation.write(line.rstrip(b"\n"), **limits):
        _print_now(chunk, file)
        if interrupted:
          break
    _print_now("\n", file)


def _print_now(text: str, file: samples.TextFile) -> None:
  """Writes text to the file and to standard output."""
  file.write(text)
  print(text, end="", flush=True)


def _write_images(run: OpenRun, options: SampleFlags, name: str, size: int, settings: Any) -> None:
  """Samples images of `size` x `size` pixels, and writes them as a grid to a PNG file.

  Args:
    run: the run.
    options: the flags of sampling.
    name: name of the file in samples/, unless --png names another file.
    size: height and width of an image in pixels.
    settings: sampling parameters of `generate`.
  """
  if options.png:
    path = pathlib.Path(options.png)
    files.prepare_directory(path.absolute().parent)
  else:
    path = samples.new_file(run.directory, name)
  content = samples.sample_images(
    run.model.params, run.model.config, options.images, size=size, **settings
  )
  files.write_atomically(path, content)
  print(f"{options.images} images of {size} x {size} pixels: {path}")
