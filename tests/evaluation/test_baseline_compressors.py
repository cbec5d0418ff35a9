"""Baselines: general-purpose compressors that may learn from the training text."""

import bz2
import gzip
import lzma

import pytest

from tvq_haiku import data
from tvq_haiku.evaluation import baseline_compressors

# Name -> (function that decompresses, first bytes of a compressed file).
FORMATS = {
  "gzip -9": (gzip.decompress, b"\x1f\x8b"),
  "bzip2 -9": (bz2.decompress, b"BZh9"),
  "xz -9e": (lzma.decompress, b"\xfd7zXZ\x00"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_training_text_lowers_the_bits_per_byte(name):
  novels, compress = data.austen(), baseline_compressors.COMPRESSORS[name]
  held_out, training = novels["Persuasion"][:30_000], novels["Emma"][:30_000]
  alone = 8 * len(compress(held_out)) / len(held_out)
  assert 1.5 < baseline_compressors.bits_per_byte(compress, training, held_out) < alone


def test_formats_are_those_of_the_named_programs():
  assert FORMATS.keys() == baseline_compressors.COMPRESSORS.keys()
  text = b"Anne Elliot" * 9
  for name, (decompress, first_bytes) in FORMATS.items():
    compressed = baseline_compressors.COMPRESSORS[name](text)
    assert compressed.startswith(first_bytes) and decompress(compressed) == text
