"""What a mesh of devices would hold and say to each other, on paper: no device is needed.

Per device, of one update with n = data·fsdp devices for the rows, P parameters and their bytes:
  parameters, optimizer   exactly, by the rules of `sharding`
  gradients               of the same pieces
  one layer               put together where it is used, in the dtype of matrix products
  activations             kept for the backward pass of its rows
  fsdp sends and gets     2 (n-1)/n P to put parameters together, forward and backward, in that dtype,
                          and (n-1)/n P of gradients in float32
  data sends and gets     2 (n-1)/n P of gradients in float32
  model sends and gets    for each of the 2N branches, 2 (m-1)/m of its rows' [tokens, D], forward and
                          backward
  sequence sends and gets log2(n) + 1 times a state, forward and backward
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.model import remat as remat_lib
from tvq_haiku.model import transformer
from tvq_haiku.parallel import sharding
from tvq_haiku.training import train_step as train_step_lib


class Plan(NamedTuple):
  """What one device of a mesh has to do for an update; memory and traffic in bytes."""

  memory: dict[str, int]
  traffic: dict[str, int]  # sent, and as many received
  n_token: int  # of the window, on this device


def plan_memory(
  config: TransformerConfig, train_cfg: TrainConfig, sizes: Mapping[str, int] | None = None
) -> Plan:
  """The plan for a mesh of `sizes`; None: one device.

  `remat='auto'` stands for what it would be on a device like this one.

  >>> found = plan(TransformerConfig.pg19(remat="layer"), TrainConfig.pg19(), {"fsdp": 64})
  >>> found.n_token, found.memory["parameters"] // 10**6, found.traffic["fsdp"] // 10**8
  (4096, 95, 103)
  """
  sizes = sizes or {"data": 1}
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  train_step_lib.check_sizes(config, train_cfg, mesh)
  state = train_step_lib.train_state_shapes(config, train_cfg)
  shardings = sharding.train_state_shardings(state, mesh)
  parameters, whole = (
    _local_bytes(state.params, shardings.params),
    tree_bytes(state.params),
  )  # of float32
  data, fsdp, model, pieces = (sizes.get(axis, 1) for axis in sharding.MESH_AXES)
  n_part = train_cfg.n_accumulate
  n_token = train_cfg.global_batch_size * train_cfg.update_len // (data * fsdp * pieces * n_part)
  size = config.compute_dtype.itemsize
  kept = remat_lib.activation_bytes(config, n_token) // model
  if remat_lib.resolve_remat(config, n_token) == "layer":
    kept = kept // config.n_layer + config.n_layer * n_token * config.d_model * size
  states = jax.eval_shape(lambda: transformer.initial_state(config, train_cfg.global_batch_size))
  remembered = _local_bytes(states, sharding.state_shardings(states, mesh, config.kv_heads))
  memory = dict(
    parameters=parameters,
    gradients=parameters,
    optimizer=_local_bytes(state.opt_state, shardings.opt_state),
    layer=whole // 4 * size // config.n_layer if fsdp > 1 else 0,
    activations=kept,
    logits=3 * n_token * config.n_vocab * 4 // model,
    states=remembered,
  )
  traffic = dict(
    fsdp=(2 * n_part * whole // 4 * size + whole) // model * (fsdp - 1) // fsdp,
    data=2 * whole // (model * fsdp) * (data - 1) // data,
    model=2 * config.n_layer * 4 * n_part * n_token * config.d_model * size * (model - 1) // model,
    sequence=2 * remembered * (math.ceil(math.log2(pieces)) + 1) if pieces > 1 else 0,
  )
  return Plan(
    *({name: n for name, n in parts.items() if n} for parts in (memory, traffic)), n_token
  )


def tree_bytes(tree: Any) -> int:
  """Of all arrays, or shapes, whole."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _local_bytes(shapes: Any, shardings: Any) -> int:
  return sum(
    jax.tree.leaves(
      jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings
      )
    )
  )


def describe_plan(
  config: TransformerConfig, train_cfg: TrainConfig, sizes: Mapping[str, int]
) -> str:
  """The plan in lines for people to read."""
  found = plan_memory(config, train_cfg, sizes)

  def line(parts: Mapping[str, int]) -> str:
    total = sum(parts.values())
    return (
      f"{total / 1e9:,.2f} GB ({', '.join(f'{name} {n / 1e9:,.2f}' for name, n in parts.items())})"
    )

  mesh = ",".join(f"{name}:{n}" for name, n in sizes.items())
  return "\n".join(
    [
      f"On {mesh}, each of {math.prod(sizes.values())} devices:",
      f"  holds               about {line(found.memory)}",
      f"  sends and receives  about {line(found.traffic)} for an update",
      f"  reads               {found.n_token:,} tokens at a time, with "
      f"remat={remat_lib.resolve_remat(config, found.n_token)}",
    ]
  )
