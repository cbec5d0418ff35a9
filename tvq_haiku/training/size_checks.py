"""Checks that the sizes of a model, a batch and a mesh are compatible."""

from __future__ import annotations

import jax

from tvq_haiku.config import TrainConfig, TransformerConfig


def check_configs(caller: str, config: TransformerConfig, train_cfg: TrainConfig) -> None:
  """Checks that two arguments are configurations, in the common order.

  Args:
    caller: name of the function, for the message.
    config: the configuration of the model that was passed.
    train_cfg: the configuration of the training that was passed.

  Raises:
    TypeError: one of them has a different type.

  >>> check_configs("f", TransformerConfig.tiny(), {"lr_max": 1e-3})
  Traceback (most recent call last):
  TypeError: f: train_cfg must be a TrainConfig, got dict.
  """
  for name, value, expected in [
    ("config", config, TransformerConfig),
    ("train_cfg", train_cfg, TrainConfig),
  ]:
    if not isinstance(value, expected):
      raise TypeError(
        f"{caller}: {name} must be a {expected.__name__}, got {type(value).__name__}."
      )


def check_sizes(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None,
) -> None:
  """Checks that the sizes of model, batch and mesh are compatible.

  Args:
    config: configuration of the model.
    train_cfg: configuration of the training.
    mesh: the devices; None: one device.

  Raises:
    ValueError: sizes are incompatible; the message names them and what to change.
  """
  sizes = {} if mesh is None else dict(mesh.shape)
  _check_accumulation(config, train_cfg)
  _check_batch_axes(train_cfg, sizes)
  _check_model_axis(config, sizes)
  if sizes.get("sequence", 1) > 1:
    _check_sequence_axis(config, train_cfg, sizes)


def _check_accumulation(config: TransformerConfig, train_cfg: TrainConfig) -> None:
  if config.c_revive and train_cfg.n_accumulate > 1:
    raise ValueError(
      f"c_revive={config.c_revive} and n_accumulate={train_cfg.n_accumulate}: unused codes cannot "
      "be revived with gradient accumulation. Set n_accumulate=1 and use more devices if memory is "
      "short, or set c_revive=0."
    )


def _check_batch_axes(train_cfg: TrainConfig, sizes: dict[str, int]) -> None:
  batch_size, n_accumulate = train_cfg.global_batch_size, train_cfg.n_accumulate
  n_device = sizes.get("data", 1) * sizes.get("fsdp", 1)
  if batch_size % (n_device * n_accumulate):
    raise ValueError(
      f"mesh={sizes}: global_batch_size={batch_size} must be a multiple of data·fsdp·n_accumulate "
      f"= {n_device}·{n_accumulate}. Change one of these sizes."
    )


def _check_model_axis(config: TransformerConfig, sizes: dict[str, int]) -> None:
  n_device = sizes.get("model", 1)
  if config.kv_heads % n_device and config.d_v % n_device:
    raise ValueError(
      f"mesh={sizes}: model={n_device} must divide the number of key/value heads, "
      f"{config.kv_heads}, or the value width, d_v={config.d_v}. Use another number of devices "
      "along this axis."
    )


def _check_sequence_axis(
  config: TransformerConfig, train_cfg: TrainConfig, sizes: dict[str, int]
) -> None:
  n_shard, length = sizes["sequence"], train_cfg.update_len
  if config.attn_type != "vq":
    raise ValueError(
      f"mesh={sizes}: sequences cannot be split with attn_type={config.attn_type!r}. Use "
      "attn_type='vq', or a mesh without the axis sequence."
    )
  if length % (n_shard * config.block_len):
    raise ValueError(
      f"mesh={sizes}: update_len={length} must be a multiple of sequence·block_len = "
      f"{n_shard}·{config.block_len}, so that every device gets complete blocks."
    )
  if length // n_shard < config.mem_len:
    raise ValueError(
      f"mesh={sizes}: update_len/sequence = {length}/{n_shard} = {length // n_shard} must be at "
      f"least mem_len={config.mem_len}, because a device gets its memory from one neighbour. "
      "Increase update_len, or use fewer devices along this axis."
    )
