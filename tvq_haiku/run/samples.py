"""The directory samples/ of a run, with the texts and the images that were sampled from its model.

Its files are named after the number of updates and the seed; no file is overwritten.
"""

from __future__ import annotations

import io
import pathlib
from typing import Self, TextIO

import jax
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data import image_grid
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.generation import generate as generate_lib
from tvq_haiku.types import Params
from tvq_haiku.utils import files, progress

_DIRECTORY = "samples"


def new_file(workdir: pathlib.Path, name: str) -> pathlib.Path:
  """Returns a path under samples/ that does not exist yet.

  Args:
    workdir: directory of the run; samples/ is created if it is missing.
    name: name of the file, to which a number is added if the file exists.

  Raises:
    OSError: samples/ cannot be written to.
  """
  directory = workdir / _DIRECTORY
  files.prepare_directory(directory)
  return files.unused_path(directory / name)


class TextFile:
  """A new text file under samples/, in UTF-8, to which text is written as soon as it is sampled.

  If it cannot be written, a warning is logged, and the text is not saved.
  """

  def __init__(self, workdir: pathlib.Path, name: str):
    """Creates the file.

    Args:
      workdir: directory of the run.
      name: name of the file, to which a number is added if the file exists.
    """
    self.path: pathlib.Path | None = None  # None: the file cannot be written
    self._stream: TextIO | None = None
    try:
      self.path = new_file(workdir, name)
      self._stream = self.path.open("x", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
      self._give_up(error)

  def write(self, text: str) -> None:
    """Appends text to the file."""
    if self._stream is None:
      return
    try:
      self._stream.write(text)
      self._stream.flush()
    except OSError as error:
      self._give_up(error)

  def _give_up(self, error: OSError) -> None:
    progress.log(f"warning: the samples are printed, but not saved: {files.short_message(error)}")
    self.path = self._stream = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    if self._stream is not None:
      self._stream.close()


def sample_images(
  params: Params,
  config: TransformerConfig,
  n_image: int,
  *,
  size: int,
  rng: jax.Array,
  **sampling: float | None,
) -> bytes:
  """Samples images from a model of images.

  Args:
    params: parameters of a model with the byte vocabulary.
    config: configuration of the model.
    n_image: number of images.
    size: height and width of an image in pixels.
    rng: one random key.
    **sampling: `temperature`, `top_p`, `top_k` and `min_p` of `generate`.

  Returns:
    The content of a PNG file with a grid of the images.
  """
  out = generate_lib.generate(
    params,
    config,
    np.full((n_image, 1), ByteVocabulary.EOS, np.int32),
    max_new_tokens=3 * size**2,
    rng=rng,
    show_progress=True,
    **sampling,
  )
  images = image_grid.images_from_tokens(np.asarray(out.tokens), height=size, width=size)
  content = io.BytesIO()
  image_grid.image_grid(images).save(content, format="png")
  return content.getvalue()
