"""Parameters alone, with their configuration: one file for other people and other programs.

The format is safetensors: names such as `transformer/embedding/embeddings`, and the configuration as
JSON in the metadata.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvq_haiku.config import TransformerConfig
from tvq_haiku.model import transformer
from tvq_haiku.utils import files, optional

_FORMAT = "tvq_haiku"


def export_params(file: str | os.PathLike, config: TransformerConfig, params: Any) -> None:
  """Writes parameters and configuration; the file appears whole or not at all.

  Args:
    file: such as `params.safetensors`.
    config: of the model.
    params: of the model.

  Raises:
    ValueError: the parameters are not of this configuration.
    OSError: it cannot be written.

  >>> import tempfile
  >>> config = TransformerConfig.tiny()
  >>> params = transformer.make_transformer(config).init(
  ...     jax.random.key(0), jnp.zeros((1, 1), jnp.int32), transformer.initial_state(config, 1))
  >>> with tempfile.TemporaryDirectory() as directory:
  ...   export_params(f"{directory}/model.safetensors", config, params)
  ...   import_params(f"{directory}/model.safetensors")[0] == config
  True
  """
  transformer.check_params(params, config)
  arrays = {
    f"{module}/{name}": np.ascontiguousarray(jax.device_get(value))
    for module, leaves in params.items()
    for name, value in leaves.items()
  }
  content = _safetensors().save(arrays, {"format": _FORMAT, "config": config.to_json()})
  file = pathlib.Path(file).absolute()
  files.write_atomically(files.prepare_directory(file.parent) / file.name, content)


def import_params(file: str | os.PathLike) -> tuple[TransformerConfig, Any]:
  """The configuration and the parameters of a file that `export_params` wrote.

  Raises:
    ValueError: it is damaged, or something else.
    OSError: it cannot be read.
  """
  content, library = pathlib.Path(file).read_bytes(), _safetensors()
  try:
    arrays = library.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    settings = header["__metadata__"]
    if settings.get("format") != _FORMAT:
      raise ValueError(f"its format is {settings.get('format')!r}, not {_FORMAT!r}")
    config = TransformerConfig.from_json(settings["config"])
    params: dict[str, dict[str, Any]] = {}
    for path, value in arrays.items():
      module, _, name = path.rpartition("/")
      params.setdefault(module, {})[name] = jnp.asarray(value)
    transformer.check_params(params, config)
  except Exception as error:  # safetensors has an error of its own
    raise ValueError(
      f"{file} does not hold the parameters of a model: {str(error).splitlines()[0]}"
    ) from error
  return config, params


def _safetensors() -> Any:
  return optional.require("safetensors.numpy", extra="train", purpose="files of parameters")
