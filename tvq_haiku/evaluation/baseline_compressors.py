"""General-purpose compressors, as baselines for the bits per byte of a model."""

from __future__ import annotations

import bz2
from collections.abc import Callable
import lzma
import zlib

# Equivalent command line -> function that compresses bytes.
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
  "gzip -9": lambda text: zlib.compress(text, 9, wbits=31),
  "bzip2 -9": lambda text: bz2.compress(text, 9),
  "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


def bits_per_byte(compress: Callable[[bytes], bytes], training: bytes, held_out: bytes) -> float:
  """Computes the bits per byte of a held-out text, given the training text.

  The result is 8 (|C(training + held_out)| - |C(training)|) / |held_out|: like a model, the
  compressor may use what it has seen in the training text.

  Args:
    compress: the function C.
    training: text that the compressor sees first.
    held_out: text to measure; not empty.

  Returns:
    Bits per byte of `held_out`.

  >>> bits_per_byte(lambda text: text, b"seen", b"unseen")
  8.0
  """
  n_byte = len(compress(training + held_out)) - len(compress(training))
  return 8.0 * n_byte / len(held_out)
