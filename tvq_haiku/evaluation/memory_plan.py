"""Memory and traffic of a training step on a mesh, estimated from shapes, without any device.

Memory of one device:
  parameters    exact, from the rules of `sharding`; float32
  gradients     the same as parameters
  optimizer     the optimizer state; exact, from the rules of `sharding`
  layer         the gathered parameters of one layer, if fsdp shards them, in the dtype of matrix
                products
  activations   an estimate of what the backward pass keeps: see `remat.activation_bytes`
  logits        three float32 arrays of the shape of the logits
  states        exact: what the model carries from window to window

Traffic of one device: the bytes that it sends per update along an axis of n devices; it receives
the same number. P is the number of bytes of the float32 parameters.
  fsdp      (n-1)/n of all parameters in the dtype of matrix products, gathered once in the forward
            and once in the backward pass of each part of a batch; (n-1)/n P to reduce and scatter
            the gradients
  data      2 (n-1)/n P to sum the gradients
  model     2 (n-1)/n of the activations [tokens, D] to sum the output of each of the 2N branches,
            in the forward and in the backward pass
  sequence  log2(n) + 1 times the states, in the forward and in the backward pass
If other axes also shard the parameters or the batch, P and tokens are the share of one device.
"""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.model import remat as remat_lib
from tvq_haiku.model import transformer
from tvq_haiku.parallel import sharding
from tvq_haiku.training import size_checks
from tvq_haiku.training import train_step as train_step_lib
from tvq_haiku.types import ArrayTree


class Plan(NamedTuple):
  """Memory and traffic of one device of a mesh; entries of zero bytes are left out."""

  memory: dict[str, int]  # bytes, by purpose
  traffic: dict[str, int]  # bytes sent per update, by axis of the mesh; as many are received
  n_token: int  # tokens in one forward pass on this device


def plan_memory(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  mesh_sizes: Mapping[str, int] | None = None,
) -> Plan:
  """Estimates the memory and the traffic of one device.

  Args:
    config: configuration of the model. `remat='auto'` is resolved for a device like that of this
      process.
    train_cfg: configuration of its training.
    mesh_sizes: axis of the mesh -> number of devices. None: one device.

  Returns:
    The plan.

  Raises:
    ValueError: the sizes of model, batch and mesh do not fit together.

  >>> config, train_cfg = TransformerConfig.pg19(remat="layer"), TrainConfig.pg19()
  >>> plan = plan_memory(config, train_cfg, {"fsdp": 64})
  >>> plan.n_token, plan.memory["parameters"] // 10**6, plan.traffic["fsdp"] // 10**8
  (4096, 95, 103)
  """
  mesh_sizes = mesh_sizes or {"data": 1}
  mesh = AbstractMesh(tuple(mesh_sizes.values()), tuple(mesh_sizes))
  size_checks.check_sizes(config, train_cfg, mesh)
  n_shard = math.prod(n for axis, n in mesh_sizes.items() if axis != "model")
  n_part = n_shard * train_cfg.n_accumulate
  batch_size = train_cfg.global_batch_size
  n_token = batch_size * train_cfg.update_len // n_part
  states = jax.eval_shape(lambda: transformer.initial_state(config, batch_size))
  state_bytes = _bytes_per_device(states, sharding.state_shardings(states, mesh, config.kv_heads))
  memory = _memory(config, train_cfg, mesh, n_token) | {"states": state_bytes}
  traffic = _traffic(config, train_cfg, mesh, n_token, state_bytes)
  return Plan(
    {purpose: n for purpose, n in memory.items() if n},
    {axis: n for axis, n in traffic.items() if n},
    n_token,
  )


def _memory(
  config: TransformerConfig, train_cfg: TrainConfig, mesh: AbstractMesh, n_token: int
) -> dict[str, int]:
  """Returns the bytes of one device by purpose, without the states."""
  model = mesh.shape.get("model", 1)
  train_state = train_step_lib.train_state_shapes(config, train_cfg)
  shardings = sharding.train_state_shardings(train_state, mesh)
  parameters = _bytes_per_device(train_state.params, shardings.params)
  itemsize = config.compute_dtype.itemsize
  activations = remat_lib.activation_bytes(config, n_token) // model
  if remat_lib.resolve_remat(config, n_token) == "layer":
    # The activations of one layer at a time, and the input of every layer.
    inputs = config.n_layer * n_token * config.d_model * itemsize
    activations = activations // config.n_layer + inputs
  gathered = 0
  if mesh.shape.get("fsdp", 1) > 1:
    gathered = tree_bytes(train_state.params) // 4 * itemsize // config.n_layer
  return dict(
    parameters=parameters,
    gradients=parameters,
    optimizer=_bytes_per_device(train_state.opt_state, shardings.opt_state),
    layer=gathered,
    activations=activations,
    logits=3 * n_token * config.n_vocab * 4 // model,
  )


def _traffic(
  config: TransformerConfig,
  train_cfg: TrainConfig,
  mesh: AbstractMesh,
  n_token: int,
  state_bytes: int,
) -> dict[str, int]:
  """Returns the bytes that one device sends per update, by axis of the mesh."""
  data, fsdp, model, sequence = (mesh.shape.get(axis, 1) for axis in sharding.MESH_AXES)
  params = tree_bytes(train_step_lib.train_state_shapes(config, train_cfg).params)
  n_part, itemsize = train_cfg.n_accumulate, config.compute_dtype.itemsize
  gathered = 2 * n_part * params // 4 * itemsize
  branches = 2 * config.n_layer * n_part * n_token * config.d_model * itemsize
  rounds = math.ceil(math.log2(sequence)) + 1
  return dict(
    fsdp=(gathered + params) // model * (fsdp - 1) // fsdp,
    data=2 * params // (model * fsdp) * (data - 1) // data,
    model=4 * branches * (model - 1) // model,
    sequence=2 * state_bytes * rounds if sequence > 1 else 0,
  )


def tree_bytes(tree: ArrayTree) -> int:
  """Returns the total bytes of a tree of arrays or `jax.ShapeDtypeStruct`s, without sharding."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _bytes_per_device(shapes: ArrayTree, shardings: ArrayTree) -> int:
  """Returns the total bytes of one shard of each array in a tree."""

  def shard_bytes(x: jax.ShapeDtypeStruct, placement: jax.sharding.Sharding) -> int:
    return math.prod(placement.shard_shape(x.shape)) * x.dtype.itemsize

  return sum(jax.tree.leaves(jax.tree.map(shard_bytes, shapes, shardings)))


def describe_plan(
  config: TransformerConfig, train_cfg: TrainConfig, mesh_sizes: Mapping[str, int]
) -> str:
  """Formats the plan for a mesh in a few lines of text.

  Args:
    config: configuration of the model.
    train_cfg: configuration of its training.
    mesh_sizes: axis of the mesh -> number of devices.
  """
  plan = plan_memory(config, train_cfg, mesh_sizes)

  def total(parts: Mapping[str, int]) -> str:
    each = ", ".join(f"{name} {n / 1e9:,.2f}" for name, n in parts.items())
    return f"about {sum(parts.values()) / 1e9:,.2f} GB ({each})"

  mesh = ",".join(f"{axis}:{n}" for axis, n in mesh_sizes.items())
  remat = remat_lib.resolve_remat(config, plan.n_token)
  return "\n".join(
    [
      f"On {mesh}, each of {math.prod(mesh_sizes.values())} devices:",
      f"  needs               {total(plan.memory)} of memory",
      f"  sends and receives  {total(plan.traffic)} per update",
      f"  reads               {plan.n_token:,} tokens at a time, with remat={remat}",
    ]
  )
