"""Lossless compression: an arithmetic coder driven by the probabilities of a model.

The size of a compressed file verifies the bits per byte of a model. A file consists of
  header:   magic number, version, number of lanes, number of tokens, fingerprint of the model,
            CRC-32 of the data
  checksum: CRC-32 of the header and the words
  words:    32 bits each, little-endian, from one range coder
The tokens of the data (its bytes, for the byte vocabulary) are split into contiguous lanes of equal
length, one for each batch element of the model; each step codes one token of every lane.
Compression and decompression must compute the same probabilities, bit for bit, so both run the same
compiled step, one token at a time. A file can therefore be read only on a machine of the same kind,
with the same versions of the software; otherwise `decompress` raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import json
import struct
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.data import vocabulary as vocabulary_lib
from tvq_haiku.data.vocabulary import ByteVocabulary, Vocabulary
from tvq_haiku.generation import decoder as decoder_lib
from tvq_haiku.generation import decoder_weights
from tvq_haiku.model import preconditions, transformer
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import optional, progress, value_checks

_MAGIC = b"TVQZ"
# Fields that were added to the configuration after the format was defined, with their defaults. A
# field with its default is left out of the fingerprint, so that earlier files can still be read.
_NEW_FIELDS = {"no_emb": False, "full_len": None}
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
  n_token: int  # of the data
  fingerprint: bytes  # 8 bytes, of parameters, configuration and vocabulary
  data_crc: int  # CRC-32 of the data


def compress(
  params: Params,
  config: TransformerConfig,
  data: bytes,
  *,
  vocabulary: Vocabulary = ByteVocabulary,
  rows: int = 1,
  show_progress: bool = False,
) -> bytes:
  """Compresses data to about their negative log-likelihood under a model, plus 32 bytes.

  Args:
    params: parameters of a model of text.
    config: configuration of the model.
    data: any bytes.
    vocabulary: vocabulary of the model. It must restore the data from their tokens, as the byte
      vocabulary and those of `data.train_pieces` do.
    rows: number of lanes, in [1, 65535]. More lanes are faster, but each starts without context.
    show_progress: whether to show progress on standard error.

  Returns:
    The compressed data, for `decompress`.

  Raises:
    ValueError: `rows` is out of range, the model cannot predict tokens of the vocabulary, `params`
      do not fit it, or the vocabulary does not restore the data.
    TypeError: an argument has a wrong type; the message names it.
    ImportError: the package `constriction` is not installed.
  """
  _check_model("compress", params, config, vocabulary)
  data = _check_bytes("compress", "data", data)
  rows = value_checks.check_integer("compress", "rows", rows, maximum=_MAX_LANES)
  data_tokens = _encode_exactly(data, vocabulary)
  encoder = _constriction().queue.RangeEncoder()

  def encode(position: int, distribution: Any) -> int:
    token = int(data_tokens[position])
    encoder.encode(token, distribution)
    return token

  n_token = len(data_tokens)
  with progress.bar("compressing", n_token, enabled=show_progress) as report:
    _code_lanes(params, config, _lane_starts(n_token, rows), encode, report)
  fingerprint = _fingerprint(params, config, vocabulary)
  header = _Header(_VERSION, rows, n_token, fingerprint, zlib.crc32(data))
  return _pack(header, np.asarray(encoder.get_compressed(), "<u4").tobytes())


def decompress(
  params: Params,
  config: TransformerConfig,
  packed: bytes,
  *,
  vocabulary: Vocabulary = ByteVocabulary,
  show_progress: bool = False,
) -> bytes:
  """Restores the data that `compress` was given.

  Args:
    params: the parameters that the data were compressed with.
    config: configuration of the model that the data were compressed with.
    packed: result of `compress`.
    vocabulary: the vocabulary that the data were compressed with.
    show_progress: whether to show progress on standard error.

  Returns:
    The data.

  Raises:
    CompressionError: `packed` does not come from `compress`, is damaged, or was compressed with a
      different model, vocabulary, kind of machine or version of the software.
    ValueError: the model cannot predict tokens of the vocabulary, or `params` do not fit it.
    TypeError: an argument has a wrong type; the message names it.
    ImportError: the package `constriction` is not installed.
  """
  _check_model("decompress", params, config, vocabulary)
  header, words = _unpack(_check_bytes("decompress", "packed", packed))
  if header.fingerprint != _fingerprint(params, config, vocabulary):
    raise CompressionError(
      "this was compressed with another model: parameters, configuration or vocabulary differ."
    )
  decoder = _constriction().queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
  data_tokens = np.zeros(header.n_token, np.int32)

  def decode(position: int, distribution: Any) -> int:
    data_tokens[position] = decoder.decode(distribution)
    return data_tokens[position]

  with progress.bar("decompressing", header.n_token, enabled=show_progress) as report:
    _code_lanes(params, config, _lane_starts(header.n_token, header.n_lane), decode, report)
  # Only wrong probabilities can yield special tokens, which have no bytes. Then the CRC differs.
  data = vocabulary.decode(data_tokens)
  if zlib.crc32(data) != header.data_crc:
    raise CompressionError(
      "this cannot be decompressed here: it was compressed on another kind of machine, or with "
      "other versions of jax or tvq_haiku, or it is damaged."
    )
  return data


def _check_model(
  caller: str, params: Params, config: TransformerConfig, vocabulary: Vocabulary
) -> None:
  """Raises unless the model predicts tokens of the vocabulary and has these parameters."""
  preconditions.check_language_model(caller, params, config)
  vocabulary_lib.check_vocabulary(caller, vocabulary, config.n_vocab)


def _check_bytes(caller: str, name: str, value: Any) -> bytes:
  """Returns an argument as bytes; raises a TypeError that names it if it is anything else."""
  if isinstance(value, (bytes, bytearray, memoryview)):
    return bytes(value)
  hint = f": pass {name}.encode()" if isinstance(value, str) else ""
  raise TypeError(f"{caller}: {name} must be bytes, got {type(value).__name__}{hint}.")


def _encode_exactly(data: bytes, vocabulary: Vocabulary) -> np.ndarray:
  """Returns the tokens [n] of the data; raises a ValueError if they do not restore the data."""
  try:
    tokens = vocabulary.encode(data)
  except UnicodeDecodeError:
    tokens = np.zeros(0, np.int32)
  if vocabulary.decode(tokens) != data:
    raise ValueError(
      "compress: the vocabulary does not restore these data from their tokens, so compression "
      "would lose information. Use a vocabulary of data.train_pieces, or a byte-level model."
    )
  return tokens


def _code_lanes(
  params: Params,
  config: TransformerConfig,
  starts: list[int],
  code: Callable[[int, Any], int],
  report: progress.Progress,
) -> None:
  """Calls `code` for every token, in the order of the file format.

  Args:
    params: parameters of the model.
    config: configuration of the model.
    starts: from `_lane_starts`.
    code: encodes or decodes one token: (its position, its distribution) -> the token.
    report: shows how many tokens are done.
  """
  categorical = _constriction().model.Categorical
  n_lane, n_token = len(starts) - 1, starts[-1]
  weights = decoder_weights.prepare_weights(params, config)
  state = decoder_lib.start_decoding(config, transformer.initial_state(config, n_lane))
  tokens = np.full(n_lane, ByteVocabulary.EOS, np.int32)
  n_step = starts[1]  # the first lane is the longest
  for step in range(n_step):
    probabilities, state = _next_token_probabilities(weights, config, tokens, state)
    for lane, distribution in enumerate(np.asarray(probabilities)):
      position = starts[lane] + step
      if position < starts[lane + 1]:
        tokens[lane] = code(position, categorical(distribution, perfect=False))
    if step % _STEPS_PER_REPORT == 0 or step + 1 == n_step:
      report(min(n_token, (step + 1) * n_lane))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _next_token_probabilities(
  weights: decoder_weights.DecoderWeights,
  config: TransformerConfig,
  tokens: Array,
  state: decoder_lib.DecodeState,
) -> tuple[Array, decoder_lib.DecodeState]:
  """Reads one token of each lane [B]; returns the probabilities [B, X] f32 of the next."""
  active = jnp.ones(tokens.shape, bool)
  logits, state = decoder_lib.decode_token(weights, config, tokens, state, active)
  return jax.nn.softmax(logits), state


def _lane_starts(n_token: int, n_lane: int) -> list[int]:
  """Returns where each lane starts in the tokens, followed by the end of the last one.

  >>> _lane_starts(10, 3)
  [0, 4, 8, 10]
  """
  length = -(-n_token // n_lane)
  return [min(lane * length, n_token) for lane in range(n_lane)] + [n_token]


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


def _fingerprint(params: Params, config: TransformerConfig, vocabulary: Vocabulary) -> bytes:
  """Returns 8 bytes of a hash of the configuration, all parameters and the vocabulary."""
  settings = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name not in _NEW_FIELDS or value != _NEW_FIELDS[name]
  }
  digest = hashlib.sha256(json.dumps(settings, indent=2, sort_keys=True).encode())
  for module in sorted(params):
    for name in sorted(params[module]):
      digest.update(f"{module}/{name}".encode())
      digest.update(np.ascontiguousarray(params[module][name]).tobytes())
  if vocabulary.fingerprint != ByteVocabulary.fingerprint:  # as in files of earlier releases
    digest.update(vocabulary.fingerprint.encode())
  return digest.digest()[:8]


def _constriction() -> Any:
  """Imports the coders and distributions of the package `constriction`."""
  return optional.require("constriction", extra="compress", purpose="arithmetic coding").stream
