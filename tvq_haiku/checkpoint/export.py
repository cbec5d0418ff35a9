"""Parameters and their configuration in a single file, for use by other people and programs.

The format is safetensors. Each array is named after its module and its parameter, such as
`transformer/embedding/embeddings`. The metadata hold the configuration as JSON.
"""

from __future__ import annotations

import json
import os
import pathlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.checkpoint import run_directory
from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import parameters
from tvq_haiku.types import Array, Params
from tvq_haiku.utils import files, optional

PARAMS_FILE = "params.safetensors"  # the usual name of an exported file
_FORMAT = "tvq_haiku"  # stored in the metadata, to recognize safetensors files of other programs


def export_params(params: Params, config: TransformerConfig, file: str | os.PathLike) -> None:
  """Writes parameters and their configuration to a safetensors file.

  The file is written atomically. An existing file is replaced.

  Args:
    params: the parameters of the model.
    config: the configuration of the model.
    file: path of the file, such as `params.safetensors`. Missing directories are created.

  Raises:
    ValueError: the parameters do not fit the configuration.
    OSError: the file cannot be written.

  >>> import tempfile
  >>> from tvq_haiku.model import transformer
  >>> config = TransformerConfig.tiny()
  >>> model = transformer.make_transformer(config)
  >>> params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   export_params(params, config, f"{directory}/model.safetensors")
  ...   import_params(f"{directory}/model.safetensors")[1] == config
  True
  """
  content = serialize_params(params, config)
  file = pathlib.Path(file).absolute()
  files.write_atomically(files.prepare_directory(file.parent) / file.name, content)


def serialize_params(params: Params, config: TransformerConfig) -> bytes:
  """Returns the content of the file that `export_params` writes.

  Raises:
    ValueError: the parameters do not fit the configuration.
  """
  parameters.check_params(params, config)
  arrays = {
    f"{module}/{name}": np.asarray(jax.device_get(value), order="C")
    for module, leaves in params.items()
    for name, value in leaves.items()
  }
  return _safetensors().save(arrays, {"format": _FORMAT, "config": config.to_json()})


def exported_file(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the file of exported parameters at `path`, or None if `path` holds a training run.

  Args:
    path: a file, or a directory of a run, of `LanguageModel.save` or of --command=export.
  """
  if path.is_file():
    return path
  file = path / PARAMS_FILE
  return file if file.is_file() and not run_directory.has_checkpoint(path) else None


def import_params(file: str | os.PathLike) -> tuple[Params, TransformerConfig]:
  """Reads a file that `export_params` wrote.

  Returns:
    The parameters, on the default device, and the configuration.

  Raises:
    ValueError: the file is damaged, or `export_params` did not write it.
    OSError: the file cannot be read.
  """
  content, safetensors = pathlib.Path(file).read_bytes(), _safetensors()
  try:
    arrays = safetensors.load(content)
    config = TransformerConfig.from_json(_metadata(content)["config"])
    params: dict[str, dict[str, Array]] = {}
    for path, value in arrays.items():
      module, _, name = path.rpartition("/")
      params.setdefault(module, {})[name] = jnp.asarray(value)
    parameters.check_params(params, config)
  except Exception as error:  # safetensors raises exceptions of its own type
    raise _not_parameters(file, error) from error
  return params, config


def read_config(file: str | os.PathLike) -> TransformerConfig:
  """Reads the configuration in a file that `export_params` wrote, without the parameters.

  Raises:
    ValueError: the file is damaged, or `export_params` did not write it.
    OSError: the file cannot be read.
  """
  path = pathlib.Path(file)
  with path.open("rb") as stream:
    size = stream.read(8)
    header = stream.read(min(int.from_bytes(size, "little"), path.stat().st_size))
  try:
    return TransformerConfig.from_json(_metadata(size + header)["config"])
  except Exception as error:  # a damaged file can cause many types
    raise _not_parameters(file, error) from error


def _not_parameters(file: str | os.PathLike, error: Exception) -> ValueError:
  """Returns the exception for a file that `export_params` did not write, or that is damaged."""
  return ValueError(
    f"{file} does not hold the parameters of a model ({files.short_message(error)}). Expected a "
    ".safetensors file that --command=export or tvq_haiku.export_params wrote."
  )


def _metadata(content: bytes) -> dict[str, str]:
  """Returns the metadata of a safetensors file.

  The file begins with the length of its JSON header (8 bytes) and the header itself.

  Raises:
    ValueError: `export_params` did not write the file.
  """
  header_size = int.from_bytes(content[:8], "little")
  metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
  if metadata.get("format") != _FORMAT:
    raise ValueError(f"its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
  return metadata


def _safetensors() -> ModuleType:
  """Returns the module `safetensors.numpy`."""
  return optional.require("safetensors.numpy", extra="train", purpose="exported parameters")
