"""Lossless compression by a model: its probabilities, spent by an arithmetic coder.

The compressed size is the proof of a bits-per-byte figure. A file is
  header: magic, version, rows, number of bytes, fingerprint of the model, CRC-32 of what was
          compressed, CRC-32 of all else in the file
  words:  of one range coder, 32 bits each
The data is cut into `rows` equal pieces, which the model reads side by side, a byte of each in
turn. Coding and decoding run the same compiled step on the same numbers, one token at a time: both
must see the same probabilities to the last bit. So a file can be read back on a machine of the
same kind, with the same versions, and anything else is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import hashlib
import struct
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.generation import decoder as decoder_lib
from tvq_haiku.generation import decoder_weights
from tvq_haiku.model import transformer
from tvq_haiku.types import Array
from tvq_haiku.utils import optional, progress

_MAGIC = b"TVQZ"
_VERSION = 1
_HEADER = struct.Struct("<4sBxHQ8sI")  # magic, version, rows, bytes, model, CRC of the data
_CHECKSUM = struct.Struct("<I")
_REPORT_EVERY = 256  # bytes of each row


class CompressionError(ValueError):
  """Data that can not be decompressed; the message says why."""


def compress(
  params: Mapping[str, Mapping[str, Array]],
  config: TransformerConfig,
  data: bytes,
  *,
  rows: int = 1,
  show_progress: bool = False,
) -> bytes:
  """`data`, in as many bits as the model finds it surprising, and a header of 32 bytes.

  Args:
    params: of a model with the byte vocabulary.
    config: the model.
    data: any bytes.
    rows: pieces that are read side by side: more are faster, and each starts without context.
    show_progress: on standard error.
  """
  if not 1 <= rows < 2**16:
    raise ValueError(f"compress: rows={rows} must lie in [1, 65535].")
  encoder = _queue().RangeEncoder()
  pieces = _pieces(len(data), rows)

  def encode(model: Any, row: int, place: int) -> int:
    token = data[pieces[row] + place] + 3
    encoder.encode(token, model)
    return token

  _run(params, config, len(data), rows, encode, show_progress, "compressing")
  words = np.asarray(encoder.get_compressed(), "<u4").tobytes()
  header = _HEADER.pack(
    _MAGIC, _VERSION, rows, len(data), _fingerprint(params, config), zlib.crc32(data)
  )
  return header + _CHECKSUM.pack(zlib.crc32(words, zlib.crc32(header))) + words


def decompress(
  params: Mapping[str, Mapping[str, Array]],
  config: TransformerConfig,
  packed: bytes,
  *,
  show_progress: bool = False,
) -> bytes:
  """The inverse of `compress`.

  Args:
    params: the same as when it was compressed.
    config: the model.
    packed: of `compress`.
    show_progress: on standard error.

  Raises:
    CompressionError: not of `compress`, damaged, of another model, or of another machine.
  """
  begin = _HEADER.size + _CHECKSUM.size
  if len(packed) < begin or not packed.startswith(_MAGIC):
    raise CompressionError("this is not compressed data: it does not begin with its mark.")
  _, version, rows, n_byte, fingerprint, data_crc = _HEADER.unpack_from(packed)
  (checksum,) = _CHECKSUM.unpack_from(packed, _HEADER.size)
  words = packed[begin:]
  if version != _VERSION:
    raise CompressionError(
      f"this was compressed by version {version} of the format, not {_VERSION}."
    )
  if zlib.crc32(words, zlib.crc32(packed[: _HEADER.size])) != checksum:
    raise CompressionError("this is damaged: its checksum does not fit.")
  if fingerprint != _fingerprint(params, config):
    raise CompressionError("this was compressed with another model.")
  decoder = _queue().RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
  data = bytearray(n_byte)
  pieces = _pieces(n_byte, rows)

  def decode(model: Any, row: int, place: int) -> int:
    token = decoder.decode(model)
    data[pieces[row] + place] = max(token - 3, 0)
    return token

  _run(params, config, n_byte, rows, decode, show_progress, "decompressing")
  if zlib.crc32(data) != data_crc:
    raise CompressionError(
      "this can not be read back here: it is damaged, or was compressed on "
      "another kind of machine, or with other versions of jax or this library."
    )
  return bytes(data)


def _run(
  params: Any,
  config: TransformerConfig,
  n_byte: int,
  rows: int,
  code: Callable[[Any, int, int], int],
  show_progress: bool,
  name: str,
) -> None:
  """Calls `code(distribution, row, place)` for every byte; it returns the token there."""
  if not config.causal:
    raise ValueError(f"{name}: causal=False: an encoder does not predict.")
  ByteVocabulary.check(name, config.n_vocab)
  transformer.check_params(params, config)
  categorical = optional.require(
    "constriction", extra="compress", purpose="arithmetic coding"
  ).stream.model
  weights = decoder_weights.prepare_weights(config, params)
  state = decoder_lib.start_decoding(config, transformer.initial_state(config, rows))
  pieces = _pieces(n_byte, rows)
  longest = -(-n_byte // rows)
  tokens = np.full(rows, ByteVocabulary.EOS, np.int32)
  with progress.bar(name, n_byte, enabled=show_progress) as shown:
    for place in range(longest):
      probabilities, state = _step(config, weights, tokens, state)
      for row, p in enumerate(np.asarray(probabilities)):
        if pieces[row] + place < pieces[row + 1]:
          tokens[row] = code(categorical.Categorical(p, perfect=False), row, place)
      if place % _REPORT_EVERY == 0 or place + 1 == longest:
        shown(min(n_byte, (place + 1) * rows))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
  config: TransformerConfig,
  weights: decoder_weights.DecoderWeights,
  tokens: Array,
  state: decoder_lib.DecodeState,
) -> tuple[Array, decoder_lib.DecodeState]:
  logits, state = decoder_lib.decode_token(
    config, weights, tokens, state, jnp.ones(tokens.shape, bool)
  )
  return jax.nn.softmax(logits), state


def _pieces(n_byte: int, rows: int) -> list[int]:
  """Where each row's piece starts, and the end."""
  length = -(-n_byte // rows)
  return [min(row * length, n_byte) for row in range(rows)] + [n_byte]


def _fingerprint(params: Mapping[str, Mapping[str, Array]], config: TransformerConfig) -> bytes:
  """8 bytes that tell this model from others."""
  digest = hashlib.sha256(config.to_json().encode())
  for module in sorted(params):
    for name in sorted(params[module]):
      digest.update(f"{module}/{name}".encode())
      digest.update(np.ascontiguousarray(params[module][name]).tobytes())
  return digest.digest()[:8]


def _queue() -> Any:
  return optional.require(
    "constriction", extra="compress", purpose="arithmetic coding"
  ).stream.queue
