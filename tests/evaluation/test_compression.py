"""Compression is lossless, as small as the score predicts, and detects damage."""

import struct
import zlib

import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.evaluation import compression

import helpers

pytestmark = pytest.mark.slow

CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
# The logits are small, so that no probability is below the smallest one that the coder can use.
PARAMS = {
  module: {
    name: 0.05 * x if module == "transformer/unembedding" else x for name, x in leaves.items()
  }
  for module, leaves in helpers.random_params(CONFIG).items()
}
DATA = bytes(range(256)) + "It is a truth universally acknowledged, Käse 🧀. ".encode() * 12


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("content", [DATA, b"", b"a", b"ab"])
def test_decompress_inverts_compress(content, rows):
  packed = tvq.compress(PARAMS, CONFIG, content, rows=rows)
  assert tvq.decompress(PARAMS, CONFIG, packed) == content


class TestPieces:
  @pytest.fixture
  def model(self, pieces):
    config = CONFIG.replace(n_vocab=pieces.size, e_scale=0.1)
    return helpers.random_params(config), config

  @pytest.mark.parametrize("content", [DATA, b"", "🧀".encode()[:3], b"\n\n", "▁ ".encode()])
  def test_any_bytes_are_restored(self, model, pieces, content):
    packed = tvq.compress(*model, content, vocabulary=pieces, rows=2)
    assert tvq.decompress(*model, packed, vocabulary=pieces) == content

  def test_compressed_size_matches_the_score(self, model, pieces):
    text = data.austen()["Emma"][:1500]
    bits = -tvq.score(*model, [text], vocabulary=pieces).logprobs[0] / np.log(2)
    size = len(tvq.compress(*model, text, vocabulary=pieces))
    assert abs(size - bits / 8) <= 0.005 * bits / 8 + 64

  def test_the_vocabulary_is_part_of_the_model(self, model, pieces, monkeypatch):
    packed = tvq.compress(*model, DATA, vocabulary=pieces)
    monkeypatch.setattr(pieces, "fingerprint", "pieces-400-0")
    with pytest.raises(tvq.CompressionError, match="configuration or vocabulary differ"):
      tvq.decompress(*model, packed, vocabulary=pieces)

  def test_text_that_the_vocabulary_would_change_is_refused(self):
    class Lower(data.ByteVocabulary):
      @classmethod
      def encode(cls, text):
        return data.ByteVocabulary.encode(text.lower())

    packed = tvq.compress(PARAMS, CONFIG, b"anne", vocabulary=Lower)
    assert tvq.decompress(PARAMS, CONFIG, packed, vocabulary=Lower) == b"anne"
    with pytest.raises(ValueError, match="compress: the vocabulary does not restore these data"):
      tvq.compress(PARAMS, CONFIG, b"Anne", vocabulary=Lower)


def test_compressed_size_matches_the_score():
  bits = -tvq.score(PARAMS, CONFIG, [DATA]).logprobs[0] / np.log(2)
  size = len(tvq.compress(PARAMS, CONFIG, DATA))
  assert abs(size - bits / 8) <= 0.005 * bits / 8 + 64
  assert size > 500


def test_lanes_are_contiguous_and_equally_long_except_at_the_end():
  assert compression._lane_starts(10, 3) == [0, 4, 8, 10]
  assert compression._lane_starts(2, 3) == [0, 1, 2, 2]
  assert compression._lane_starts(0, 2) == [0, 0, 0]


def test_a_lane_does_not_depend_on_the_bytes_of_other_lanes(monkeypatch):
  steps = []
  next_token_probabilities = compression._next_token_probabilities

  def recorded(*arguments):
    probabilities, state = next_token_probabilities(*arguments)
    steps.append(np.asarray(probabilities))
    return probabilities, state

  monkeypatch.setattr(compression, "_next_token_probabilities", recorded)
  tvq.compress(PARAMS, CONFIG, b"BathAnne", rows=2)
  tvq.compress(PARAMS, CONFIG, b"BathEmma", rows=2)
  first, second = np.array(steps[:4]), np.array(steps[4:])  # [step, lane, X]
  np.testing.assert_array_equal(first[:, 0], second[:, 0])
  assert (first[1:, 1] != second[1:, 1]).any(axis=-1).all()


def test_file_format():
  """The layout must not change, so that files of earlier releases can be read."""
  content = b"It is a truth universally acknowledged"
  packed = tvq.compress(PARAMS, CONFIG, content, rows=2)
  magic, version, n_lane, n_byte, fingerprint, data_crc, checksum = struct.unpack_from(
    "<4sBxHQ8sII", packed
  )
  assert (magic, version, n_lane, n_byte) == (b"TVQZ", 1, 2, len(content))
  assert fingerprint == compression._fingerprint(PARAMS, CONFIG, data.ByteVocabulary)
  assert data_crc == zlib.crc32(content)
  assert checksum == zlib.crc32(packed[:28] + packed[32:])
  assert len(packed) % 4 == 0


def flip(packed, position):
  """Flips the lowest bit of one byte."""
  return packed[:position] + bytes([packed[position] ^ 1]) + packed[position + 1 :]


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda packed: b"", "not compressed data"),
    (lambda packed: b"plain text that is long enough for a header", "not compressed data"),
    (lambda packed: packed[:40], "damaged"),
    (lambda packed: packed + b"1234", "damaged"),
    (lambda packed: flip(packed, -1), "damaged"),
    (lambda packed: flip(packed, 60), "damaged"),
    (lambda packed: flip(packed, 4), "version 0 of the format, but only version 1"),
    (lambda packed: flip(packed, 16), "damaged"),
    (lambda packed: flip(packed, 28), "damaged"),
  ],
)
def test_damage_is_detected(damage, message):
  packed = tvq.compress(PARAMS, CONFIG, b"Anne Elliot, and some more bytes than a header has")
  with pytest.raises(tvq.CompressionError, match=message):
    tvq.decompress(PARAMS, CONFIG, damage(packed))


def test_different_probabilities_are_detected(monkeypatch):
  """Simulates a different machine or version: the same model with different probabilities."""
  packed = tvq.compress(PARAMS, CONFIG, b"Anne Elliot")
  other = helpers.random_params(CONFIG)
  monkeypatch.setattr(compression, "_fingerprint", lambda *_: packed[16:24])
  with pytest.raises(tvq.CompressionError, match="cannot be decompressed here"):
    tvq.decompress(other, CONFIG, packed)


def test_wrong_size_in_the_header_is_detected_before_memory_is_allocated():
  packed = bytearray(tvq.compress(PARAMS, CONFIG, b"Anne"))
  struct.pack_into("<Q", packed, 8, 2**60)
  with pytest.raises(tvq.CompressionError, match="damaged"):
    tvq.decompress(PARAMS, CONFIG, bytes(packed))


def test_another_model_is_rejected():
  packed = tvq.compress(PARAMS, CONFIG, b"Anne")
  for params, config in (
    (helpers.random_params(CONFIG, seed=1), CONFIG),
    (PARAMS, CONFIG.replace(doc_mask=False)),
  ):
    with pytest.raises(tvq.CompressionError, match="another model"):
      tvq.decompress(params, config, packed)


@pytest.mark.parametrize("rows", [0, 65_536])
def test_number_of_lanes_out_of_range_is_rejected(rows):
  with pytest.raises(
    ValueError, match=rf"compress: rows={rows} must be an integer in \[1, 65535\]"
  ):
    tvq.compress(PARAMS, CONFIG, b"", rows=rows)


@pytest.mark.parametrize("function", [tvq.compress, tvq.decompress])
@pytest.mark.parametrize("value", ["text", None, [b"a"], 3])
def test_anything_but_bytes_is_named(function, value):
  name = "data" if function is tvq.compress else "packed"
  message = f"{function.__name__}: {name} must be bytes, got {type(value).__name__}"
  with pytest.raises(TypeError, match=message):
    function(PARAMS, CONFIG, value)


def test_models_that_do_not_predict_bytes_are_rejected():
  for name, function in (("compress", tvq.compress), ("decompress", tvq.decompress)):
    with pytest.raises(ValueError, match=f"{name}: the model has n_vocab=11, not the 259"):
      function(helpers.random_params(helpers.tiny()), helpers.tiny(), b"a")
    with pytest.raises(ValueError, match=f"{name}: causal=False: an encoder cannot predict"):
      function(PARAMS, CONFIG.replace(causal=False), b"a")
    with pytest.raises(ValueError, match="params"):
      function(PARAMS, CONFIG.replace(d_k=8), b"a")
