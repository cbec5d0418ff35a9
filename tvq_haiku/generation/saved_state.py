"""States of the model in files, so that a text can be continued later, bit for bit.

A file consists of a magic number, the version of the format, a CRC-32 of the rest, and the rest: an
.npz archive that holds the fields of the state, the logits, pending bytes and the configuration.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import struct
from typing import NamedTuple
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import state as state_lib
from tvq_haiku.model.state import TransformerState
from tvq_haiku.types import Array
from tvq_haiku.utils import checks, files, value_checks

_MAGIC = b"TVQS"
_VERSION = 1
_HEADER = struct.Struct("<4sBxxxI")  # magic number, version, CRC-32 of the rest
# Fields that change how a result is computed, but not the result.
_EXECUTION_FIELDS = ("block_len", "reduction", "remat")


class SavedState(NamedTuple):
  """The content of a file; the fields have the names of the arguments of `Conversation`."""

  state: TransformerState  # of B texts
  logits: Array | None  # [B, X] f32: logits of the token after `state`; None: they were not saved
  pending: bytes  # bytes of an incomplete character, see `Conversation.pending`


def save_state(
  state: TransformerState,
  config: TransformerConfig,
  file: str | os.PathLike,
  *,
  logits: Array | None = None,
  pending: bytes = b"",
) -> None:
  """Writes a state of the model to a file, from which texts can be continued later.

  The file is written atomically. An existing file is replaced.

  Args:
    state: the state, such as `state` of a result of `generate` or of a `Conversation`.
    config: configuration of the model.
    file: path of the file; missing directories are created.
    logits: [B, X]: `logits` of the same result, required if an empty prompt continues a text.
    pending: `pending` of a `Conversation`.

  Raises:
    ValueError: the state or the logits do not fit the configuration.
    TypeError: an argument has a wrong type.
    OSError: the file cannot be written.

  >>> import tempfile
  >>> config = TransformerConfig.tiny()
  >>> state = state_lib.initial_state(config, 2)
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   save_state(state, config, f"{directory}/text.state")
  ...   load_state(config, f"{directory}/text.state").state.position.tolist()
  [0, 0]
  """
  value_checks.check_not_traced("save_state", (state, logits))
  B = _batch_size(state)
  _check_config("save_state", config, "(state, config, file)")
  state_lib.check_state(state, config, B)
  dims = chex.Dimensions(B=B, X=config.n_vocab)
  checks.check_arrays("save_state", dims, logits=(logits, "BX", jnp.floating))
  pending = value_checks.check_text("save_state", "pending", pending)
  arrays = {name: np.asarray(jax.device_get(x)) for name, x in _named_fields(state).items()}
  if logits is not None:
    arrays["logits"] = np.asarray(jax.device_get(logits), np.float32)
  arrays["pending"] = np.frombuffer(pending, np.uint8)
  arrays["config"] = np.frombuffer(config.to_json().encode(), np.uint8)
  archive = io.BytesIO()
  # NumPy cannot store bfloat16, so every array is stored as bytes; the configuration determines its
  # dtype and all axes but the batch.
  np.savez(archive, **{name: np.frombuffer(x.tobytes(), np.uint8) for name, x in arrays.items()})
  content = archive.getvalue()
  header = _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(content))
  path = pathlib.Path(file).absolute()
  files.write_atomically(files.prepare_directory(path.parent) / path.name, header + content)


def load_state(config: TransformerConfig, file: str | os.PathLike) -> SavedState:
  """Reads a file that `save_state` wrote.

  With the same parameters, keys and software on the same kind of machine, the texts continue as if
  they had not been saved, bit for bit:

      generate(params, config, np.zeros((1, 0), int), state=saved.state, logits=saved.logits, ...)
      Conversation(params, config, **saved._asdict(), ...).write("", ...)

  Args:
    config: configuration of the model.
    file: path of the file.

  Returns:
    The state, with its arrays on the default device.

  Raises:
    ValueError: the file is damaged, `save_state` did not write it, or the state is that of a model
      with another configuration; the message names the differences.
    TypeError: `config` is not a configuration.
    OSError: the file cannot be read.
  """
  _check_config("load_state", config, "(config, file)")
  content = pathlib.Path(file).read_bytes()
  if content.startswith(_MAGIC) and len(content) < _HEADER.size:
    raise ValueError(f"{file} is damaged: it is too short.")
  magic, version, checksum = _HEADER.unpack(content[: _HEADER.size].ljust(_HEADER.size, b"\0"))
  if magic != _MAGIC:
    raise ValueError(f"{file} is not a state that save_state wrote.")
  if version != _VERSION:
    raise ValueError(f"{file} has version {version}, but only version {_VERSION} can be read.")
  if zlib.crc32(content[_HEADER.size :]) != checksum:
    raise ValueError(f"{file} is damaged: its checksum does not match.")
  with np.load(io.BytesIO(content[_HEADER.size :]), allow_pickle=False) as archive:
    arrays = {name: archive[name].tobytes() for name in archive.files}
  try:
    saved_config = TransformerConfig.from_json(arrays["config"].decode())
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{file} was written by an incompatible version: {files.short_message(error)}"
    ) from error
  _check_same_model(file, saved_config, config)
  B = len(arrays["document"]) // np.dtype(np.int32).itemsize
  shapes = jax.eval_shape(lambda: state_lib.initial_state(config, B))

  def read(name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.asarray(np.frombuffer(arrays[name], dtype).reshape(shape))

  fields = [read(name, x.shape, x.dtype) for name, x in _named_fields(shapes).items()]
  logits = None
  if "logits" in arrays:
    logits = read("logits", (B, config.n_vocab), jnp.dtype(jnp.float32))
  state = jax.tree.unflatten(jax.tree.structure(shapes), fields)
  return SavedState(state, logits, arrays["pending"])


def _batch_size(state: TransformerState) -> int:
  """Returns B; raises a TypeError if `state` is not a state of the model."""
  if not isinstance(state, TransformerState):
    raise TypeError(
      f"save_state: state must be a TransformerState, got {type(state).__name__}. Pass "
      "(state, config, file)."
    )
  return state.document.shape[0]


def _check_config(caller: str, config: TransformerConfig, order: str) -> None:
  """Raises a TypeError, which names the order of the arguments, if `config` is not one."""
  if not isinstance(config, TransformerConfig):
    raise TypeError(
      f"{caller}: config must be a TransformerConfig, got {type(config).__name__}. Pass {order}."
    )


def _named_fields(state: TransformerState) -> dict[str, Array]:
  """Returns the fields of a state by name, such as attention_1.memory_keys, in their order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path).removeprefix("."): field for path, field in leaves}


def _check_same_model(
  file: str | os.PathLike, saved: TransformerConfig, config: TransformerConfig
) -> None:
  """Raises a ValueError that names the fields in which two configurations differ."""
  differences = [
    f"{name} is {getattr(saved, name)!r} in the file, {value!r} here"
    for name, value in dataclasses.asdict(config).items()
    if name not in _EXECUTION_FIELDS and getattr(saved, name) != value
  ]
  if differences:
    raise ValueError(
      f"{file} is the state of a model with a different configuration: {'; '.join(differences)}."
    )
