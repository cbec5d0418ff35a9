"""Compression: what comes out is what went in, in as many bits as the score says."""

import struct

import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku.evaluation import compression

import helpers

CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
# Gentle logits, so that no byte costs more than the coder's finest probability.
PARAMS = {
  module: {
    name: 0.05 * x if module == "transformer/unembedding" else x for name, x in leaves.items()
  }
  for module, leaves in helpers.random_params(CONFIG).items()
}
DATA = bytes(range(256)) + "It is a truth universally acknowledged, Käse 🧀. ".encode() * 12


@pytest.mark.parametrize("rows", [1, 3])
def test_what_comes_out_is_what_went_in(rows):
  for data in (DATA, b"", b"a", b"ab"):
    packed = tvq.compress(PARAMS, CONFIG, data, rows=rows)
    assert tvq.decompress(PARAMS, CONFIG, packed) == data


def test_its_size_is_the_score():
  bits = -tvq.score(PARAMS, CONFIG, [DATA]).logprobs[0] / np.log(2)
  size = len(tvq.compress(PARAMS, CONFIG, DATA))
  assert abs(size - bits / 8) <= 0.005 * bits / 8 + 64
  assert size > 500


def test_rows_depend_on_their_own_bytes_alone():
  assert compression._pieces(10, 3) == [0, 4, 8, 10]
  assert compression._pieces(2, 3) == [0, 1, 2, 2]
  assert compression._pieces(0, 2) == [0, 0, 0]


def flip(packed, place):
  return packed[:place] + bytes([packed[place] ^ 1]) + packed[place + 1 :]


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda packed: b"", "not compressed data"),
    (lambda packed: b"plain text that is long enough for a header", "not compressed data"),
    (lambda packed: packed[:40], "damaged"),
    (lambda packed: packed + b"1234", "damaged"),
    (lambda packed: flip(packed, -1), "damaged"),
    (lambda packed: flip(packed, 60), "damaged"),
    (lambda packed: flip(packed, 4), "version 0 of the format, not 1"),
    (lambda packed: flip(packed, 16), "damaged"),
    (lambda packed: flip(packed, 28), "damaged"),
  ],
)
def test_damage_is_noticed(damage, message):
  packed = tvq.compress(PARAMS, CONFIG, b"Anne Elliot, and some more bytes than a header has")
  with pytest.raises(tvq.CompressionError, match=message):
    tvq.decompress(PARAMS, CONFIG, damage(packed))


def test_a_model_that_computes_otherwise_is_noticed(monkeypatch):
  packed = tvq.compress(PARAMS, CONFIG, b"Anne Elliot")
  other = helpers.random_params(CONFIG)
  monkeypatch.setattr(compression, "_fingerprint", lambda *_: packed[16:24])
  with pytest.raises(tvq.CompressionError, match="can not be read back here"):
    tvq.decompress(other, CONFIG, packed)


def test_a_damaged_header_asks_for_no_memory_and_no_time():
  packed = bytearray(tvq.compress(PARAMS, CONFIG, b"Anne"))
  struct.pack_into("<Q", packed, 8, 2**60)
  with pytest.raises(tvq.CompressionError, match="damaged"):
    tvq.decompress(PARAMS, CONFIG, bytes(packed))


def test_another_model_is_refused():
  packed = tvq.compress(PARAMS, CONFIG, b"Anne")
  for params, config in (
    (helpers.random_params(CONFIG, seed=1), CONFIG),
    (PARAMS, CONFIG.replace(doc_mask=False)),
  ):
    with pytest.raises(tvq.CompressionError, match="another model"):
      tvq.decompress(params, config, packed)


def test_what_cannot_be_compressed():
  with pytest.raises(ValueError, match="rows=0"):
    tvq.compress(PARAMS, CONFIG, b"", rows=0)
  with pytest.raises(ValueError, match="n_vocab=11, not the 259"):
    tvq.compress({}, helpers.tiny(), b"a")
  with pytest.raises(ValueError, match="causal=False"):
    tvq.compress(PARAMS, CONFIG.replace(causal=False), b"a")
