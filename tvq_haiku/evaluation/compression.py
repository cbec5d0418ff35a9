"""Lossless compression: an arithmetic coder driven by the probabilities of a model.

The size of a compressed file verifies the bits per byte of a model. A file consists of
  header:   magic number, version, number of lanes, number of bytes, fingerprint of the model,
            CRC-32 of the data
  checksum: CRC-32 of the header and the words
  words:    32 bits each, little-endian, from one range coder
The data are split into contiguous lanes of equal length, one for each batch element of the model;
each step codes one byte of every lane. Compression and decompression must compute the same
probabilities, bit for bit, so both run the same compiled step, one token at a time. A file can
therefore be read only on a machine of the same kind, with the same versions of the software;
otherwise `decompress` raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import hashlib
import struct
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data.vocabulary import ByteVocabulary
from tvq_haiku.generation import decoder as decoder_lib
from tvq_haiku.generation import decoder_weights
from tvq_haiku.model import transformer
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import optional, progress

_MAGIC = b"TVQZ"
_VERSION = 1
_HEADER = struct.Struct("<4sBxHQ8sI")  # the magic number, then the fields of `_Header`
_CHECKSUM = struct.Struct("<I")
_MAX_LANES = 2**16 - 1
_STEPS_PER_REPORT = 256  # steps between two updates of the progress bar


class CompressionError(ValueError):
  """Raised when data cannot be decompressed; the message gives the reason."""


class _Header(NamedTuple):
  """Header of a compressed file."""

  version: int  # of the file format
  n_lane: int
  n_byte: int  # of the data
  fingerprint: bytes  # 8 bytes, of parameters and configuration
  data_crc: int  # CRC-32 of the data


def compress(
  params: Params,
  config: TransformerConfig,
  data: bytes,
  *,
  rows: int = 1,
  show_progress: bool = False,
) -> bytes:
  """Compresses data to about their negative log-likelihood under a model, plus 32 bytes.

  Args:
    params: parameters of a model with the byte vocabulary.
    config: configuration of the model.
    data: any bytes.
    rows: number of lanes, in [1, 65535]. More lanes are faster, but each starts without context.
    show_progress: whether to show progress on standard error.

  Returns:
    The compressed data, for `decompress`.

  Raises:
    ValueError: `rows` is out of range, the model cannot predict bytes, or `params` do not fit it.
    ImportError: the package `constriction` is not installed.
  """
  if not 1 <= rows <= _MAX_LANES:
    raise ValueError(f"compress: rows={rows} must lie in [1, {_MAX_LANES}].")
  _check_model("compress", params, config)
  encoder = _constriction().queue.RangeEncoder()

  def encode(position: int, distribution: Any) -> int:
    token = data[position] + ByteVocabulary.OFFSET
    encoder.encode(token, distribution)
    return token

  with progress.bar("compressing", len(data), enabled=show_progress) as report:
    _code_lanes(params, config, _lane_starts(len(data), rows), encode, report)
  header = _Header(_VERSION, rows, len(data), _fingerprint(params, config), zlib.crc32(data))
  return _pack(header, np.asarray(encoder.get_compressed(), "<u4").tobytes())


def decompress(
  params: Params,
  config: TransformerConfig,
  packed: bytes,
  *,
  show_progress: bool = False,
) -> bytes:
  """Restores the data that `compress` was given.

  Args:
    params: the parameters that the data were compressed with.
    config: configuration of the model that the data were compressed with.
    packed: result of `compress`.
    show_progress: whether to show progress on standard error.

  Returns:
    The data.

  Raises:
    CompressionError: `packed` does not come from `compress`, is damaged, or was compressed with a
      different model, kind of machine or version of the software.
    ValueError: the model cannot predict bytes, or `params` do not fit it.
    ImportError: the package `constriction` is not installed.
  """
  _check_model("decompress", params, config)
  header, words = _unpack(packed)
  if header.fingerprint != _fingerprint(params, config):
    raise CompressionError(
      "this was compressed with another model: parameters or configuration differ."
    )
  decoder = _constriction().queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
  data = bytearray(header.n_byte)

  def decode(position: int, distribution: Any) -> int:
    token = decoder.decode(distribution)
    # Only wrong probabilities can yield a special token. The CRC of the data then does not match.
    data[position] = max(token - ByteVocabulary.OFFSET, 0)
    return token

  with progress.bar("decompressing", header.n_byte, enabled=show_progress) as report:
    _code_lanes(params, config, _lane_starts(header.n_byte, header.n_lane), decode, report)
  if zlib.crc32(data) != header.data_crc:
    raise CompressionError(
      "this cannot be decompressed here: it was compressed on another kind of machine, or with "
      "other versions of jax or tvq_haiku, or it is damaged."
    )
  return bytes(data)


def _check_model(caller: str, params: Params, config: TransformerConfig) -> None:
  """Raises a ValueError unless the model predicts bytes and has these parameters."""
  if not config.causal:
    raise ValueError(
      f"{caller}: causal=False: an encoder does not predict the next token. Use a causal model."
    )
  ByteVocabulary.check(caller, config.n_vocab)
  transformer.check_params(params, config)


def _code_lanes(
  params: Params,
  config: TransformerConfig,
  starts: list[int],
  code: Callable[[int, Any], int],
  report: progress.Progress,
) -> None:
  """Calls `code` for every byte, in the order of the file format.

  Args:
    params: parameters of the model.
    config: configuration of the model.
    starts: from `_lane_starts`.
    code: encodes or decodes one byte: (position in the data, its distribution) -> its token.
    report: shows how many bytes are done.
  """
  categorical = _constriction().model.Categorical
  n_lane, n_byte = len(starts) - 1, starts[-1]
  weights = decoder_weights.prepare_weights(params, config)
  state = decoder_lib.start_decoding(config, transformer.initial_state(config, n_lane))
  tokens = np.full(n_lane, ByteVocabulary.EOS, np.int32)
  n_step = starts[1]  # the first lane is the longest
  for step in range(n_step):
    probabilities, state = _next_byte_probabilities(weights, config, tokens, state)
    for lane, distribution in enumerate(np.asarray(probabilities)):
      position = starts[lane] + step
      if position < starts[lane + 1]:
        tokens[lane] = code(position, categorical(distribution, perfect=False))
    if step % _STEPS_PER_REPORT == 0 or step + 1 == n_step:
      report(min(n_byte, (step + 1) * n_lane))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _next_byte_probabilities(
  weights: decoder_weights.DecoderWeights,
  config: TransformerConfig,
  tokens: Array,
  state: decoder_lib.DecodeState,
) -> tuple[Array, decoder_lib.DecodeState]:
  """Reads one token of each lane [B]; returns the probabilities [B, X] f32 of the next."""
  active = jnp.ones(tokens.shape, bool)
  logits, state = decoder_lib.decode_token(weights, config, tokens, state, active)
  return jax.nn.softmax(logits), state


def _lane_starts(n_byte: int, n_lane: int) -> list[int]:
  """Returns where each lane starts in the data, followed by the end of the last one.

  >>> _lane_starts(10, 3)
  [0, 4, 8, 10]
  """
  length = -(-n_byte // n_lane)
  return [min(lane * length, n_byte) for lane in range(n_lane)] + [n_byte]


def _pack(header: _Header, words: bytes) -> bytes:
  """Returns the content of a compressed file."""
  packed_header = _HEADER.pack(_MAGIC, *header)
  checksum = zlib.crc32(words, zlib.crc32(packed_header))
  return packed_header + _CHECKSUM.pack(checksum) + words


def _unpack(packed: bytes) -> tuple[_Header, bytes]:
  """Returns the header and the words of a compressed file, or raises a CompressionError."""
  start = _HEADER.size + _CHECKSUM.size
  if len(packed) < start or not packed.startswith(_MAGIC):
    raise CompressionError(f"this is not compressed data: it does not begin with {_MAGIC!r}.")
  header = _Header(*_HEADER.unpack_from(packed)[1:])
  if header.version != _VERSION:
    raise CompressionError(
      f"this is version {header.version} of the format, but only version {_VERSION} can be read."
    )
  words = packed[start:]
  (checksum,) = _CHECKSUM.unpack_from(packed, _HEADER.size)
  if zlib.crc32(words, zlib.crc32(packed[: _HEADER.size])) != checksum:
    raise CompressionError("this is damaged: its checksum does not match.")
  return header, words


def _fingerprint(params: Params, config: TransformerConfig) -> bytes:
  """Returns 8 bytes of a hash of the configuration and all parameters."""
  digest = hashlib.sha256(config.to_json().encode())
  for module in sorted(params):
    for name in sorted(params[module]):
      digest.update(f"{module}/{name}".encode())
      digest.update(np.ascontiguousarray(params[module][name]).tobytes())
  return digest.digest()[:8]


def _constriction() -> Any:
  """Imports the coders and distributions of the package `constriction`."""
  return optional.require("constriction", extra="compress", purpose="arithmetic coding").stream
