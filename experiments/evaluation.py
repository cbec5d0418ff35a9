"""Evaluates the model of a run on a file."""

from __future__ import annotations

import io
import pathlib

import numpy as np

from experiments.open_run import OpenRun
from experiments.shared_flags import EvalFlags
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.utils import optional


def evaluate_file(run: OpenRun, file: str, options: EvalFlags) -> str:
  """Computes the bits per byte of a file under the model of a run.

  Args:
    run: the run.
    file: path of a text; for a model of images, path of a picture, or of the raw bytes of images.
    options: the flags of evaluations.

  Returns:
    A line with the bits per byte, or per dimension of an image.

  Raises:
    ValueError: the file is missing or empty, or the model cannot read it.
  """
  size = run.record.image_size
  try:
    content = pathlib.Path(file).read_bytes()
  except OSError as error:
    raise ValueError(f"--file={file} cannot be read: {error.strerror}.") from error
  if not content:
    raise ValueError(f"--file={file} is empty: there is nothing to evaluate.")
  try:
    if size:
      stream = _image_stream(content, size)
    else:
      stream = data.stream_of([run.model.vocabulary.encode(content)])
  except ValueError as error:
    raise ValueError(f"--file={file}: {error}") from error
  n_byte = len(stream) if size else len(content)
  likelihood = tvq.evaluate(
    run.model.params,
    run.model.config,
    stream,
    batch_size=options.eval_rows,
    window_len=options.eval_window,
    align=3 * size**2 if size else 1,
    show_progress=True,
  )
  return (
    f"{likelihood.bits_per(n_byte):.4f} bits per {'dimension' if size else 'byte'} over "
    f"{n_byte:,} bytes ({likelihood.nats_per_token:.4f} nats per token)"
  )


def _image_stream(content: bytes, size: int) -> data.TokenStream:
  """Returns the bytes of images as a stream of one document per image.

  Args:
    content: content of a picture file, or the raw bytes (RGB) of one or more images.
    size: height and width of an image in pixels.

  Raises:
    ValueError: the images have a different size.
  """
  n_byte = 3 * size**2
  pixels = _read_picture(content, size)
  if not pixels or len(pixels) % n_byte:
    raise ValueError(
      f"it must be a picture of {size} x {size} pixels, or the bytes of such images, {n_byte:,} "
      "each."
    )
  ends = np.arange(n_byte, len(pixels) + 1, n_byte)
  return data.TokenStream(np.frombuffer(pixels, np.uint8), ends, data.ByteVocabulary.OFFSET)


def _read_picture(content: bytes, size: int) -> bytes:
  """Returns the raw bytes (RGB) of the picture in a file.

  Args:
    content: content of the file.
    size: expected height and width in pixels.

  Returns:
    The bytes; empty if the picture has a different size; `content` if it is not a picture file.
  """
  image = optional.require("PIL.Image", extra="images", purpose="pictures")
  try:
    with image.open(io.BytesIO(content)) as picture:
      return picture.convert("RGB").tobytes() if picture.size == (size, size) else b""
  except image.UnidentifiedImageError:
    return content
