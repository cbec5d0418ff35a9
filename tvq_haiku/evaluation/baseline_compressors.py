"""What general-purpose compressors make of a held-out text: the yardstick for bits per byte."""

from __future__ import annotations

import bz2
from collections.abc import Callable
import lzma
import zlib

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
  "gzip -9": lambda text: zlib.compress(text, 9, wbits=31),
  "bzip2 -9": lambda text: bz2.compress(text, 9),
  "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


def bits_per_byte(compress: Callable[[bytes], bytes], training: bytes, held_out: bytes) -> float:
  """8 (C(training + held_out) - C(training)) / |held_out|: with the training text to learn from.

  >>> bits_per_byte(lambda text: text, b"seen", b"unseen")
  8.0
  """
  both = len(compress(training + held_out))
  return 8.0 * (both - len(compress(training))) / len(held_out)
