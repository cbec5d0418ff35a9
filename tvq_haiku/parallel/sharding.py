"""Where arrays live on a mesh of devices: every rule of it.

A mesh has some of these axes, such as `data:4,model:2`:
  data      rows of the batch; every device has all parameters
  fsdp      rows of the batch, too; parameters and optimizer are cut up, and put together where used
  model     key/value heads, or the width of their values if heads cannot be dealt out evenly
  sequence  consecutive blocks of one sequence: see `parallel_attention`
An axis that does not divide what it would cut leaves it whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from tvq_haiku.types import Array

AxisNames = str | tuple[str, ...] | None  # what cuts one dimension

MESH_AXES = ("data", "fsdp", "model", "sequence")
BATCH_AXES = ("data", "fsdp")  # of the batch

# Parameter path -> what cuts its dimensions, the axis of layers aside; the first match counts.
# Of parts that lie side by side in one kernel, columns are not cut: no cut would suit them all.
PARAM_RULES: tuple[tuple[str, tuple[AxisNames, ...]], ...] = (
  (r"embedding/embeddings", ("model", "fsdp")),  # [X, D]
  (r"unembedding/kernel", ("fsdp", "model")),  # [D, X]
  (r"attention_\d/q/kernel", ("fsdp", "model")),  # [D, H·K]
  (r"attention_\d/kvg?/kernel", (("fsdp", "model"), None)),  # [D, G·K + G·V + H·V]
  (r"attention_\d/r/kernel", ("fsdp", None)),  # [D, G·K]
  (r"attention_\d/out/kernel", ("model", "fsdp")),  # [H·V, D]
  (r"mlp/up/kernel", ("fsdp", "model")),
  (r"mlp/down/kernel", ("model", "fsdp")),
  (r"", ()),  # gains, biases and codebooks are small
)
# Fields of what an attention remembers. HEADS and WIDTH are what `model` cuts: the one or the other.
HEADS, WIDTH = "heads", "width"
STATE_RULES: Mapping[str, tuple[AxisNames, ...]] = {
  "document": (BATCH_AXES,),
  "position": (BATCH_AXES,),
  "memory_codes": (BATCH_AXES, HEADS, None),
  "memory_keys": (BATCH_AXES, HEADS, None, None),
  "memory_values": (BATCH_AXES, HEADS, None, WIDTH),
  "memory_docs": (BATCH_AXES, None),
  "cache_counts": (BATCH_AXES, HEADS, None),
  "cache_means": (BATCH_AXES, HEADS, None, WIDTH),
  "cache_doc": (BATCH_AXES,),
}


def parse_mesh(text: str) -> dict[str, int]:
  """Axes and sizes.

  >>> parse_mesh("data:4,model:2")
  {'data': 4, 'model': 2}
  """
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, _, size = part.strip().partition(":")
    if name not in MESH_AXES or name in sizes or not re.fullmatch("[1-9][0-9]*", size):
      raise ValueError(
        f"mesh={text!r}: {part!r} must be AXIS:SIZE with an axis of {', '.join(MESH_AXES)}, "
        "each at most once."
      )
    sizes[name] = int(size)
  return sizes


def make_mesh(text: str) -> Mesh:
  """The mesh of a text such as `data:8`, over the first so many devices.

  Raises:
    ValueError: there are too few devices, or several hosts have some that would be left out.
  """
  sizes = parse_mesh(text)
  need, devices = math.prod(sizes.values()), jax.devices()
  if need > len(devices) or (jax.process_count() > 1 and need < len(devices)):
    hint = (
      f" JAX_NUM_CPU_DEVICES={need} makes a CPU so many." if devices[0].platform == "cpu" else ""
    )
    raise ValueError(f"mesh={text!r} is for {need} devices, and there are {len(devices)}.{hint}")
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices[:need],
  )


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
  """While a function is traced: what `constrain` and `axis_size` refer to."""
  return (
    contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
  )


def axis_sizes() -> Mapping[str, int]:
  """Of the mesh in use; empty if there is none."""
  return jax.sharding.get_abstract_mesh().shape


def per_device(n_row: int) -> int:
  """How many of so many rows of a batch, or tokens of a window, one device gets."""
  sizes = axis_sizes()
  return -(-n_row // math.prod(sizes.get(axis, 1) for axis in (*BATCH_AXES, "sequence")))


def head_axes(n_kv_head: int, sizes: Mapping[str, int] | None = None) -> dict[str, AxisNames]:
  """What cuts key/value heads, and what cuts the width of values."""
  sizes = axis_sizes() if sizes is None else sizes
  evenly = n_kv_head % sizes.get("model", 1) == 0
  return {HEADS: "model" if evenly else None, WIDTH: None if evenly else "model"}


def state_shardings(state: Any, mesh: Mesh, n_kv_head: int) -> Any:
  """Shardings of a `TransformerState` of arrays or of shapes."""
  by_letter = head_axes(n_kv_head, mesh.shape)

  def sharding(path: Any, leaf: Any) -> NamedSharding:
    axes = [
      by_letter.get(axis, axis) if isinstance(axis, str) else axis
      for axis in STATE_RULES[path[-1].name]
    ]
    layers = (None,) * (len(leaf.shape) - len(axes))
    return NamedSharding(mesh, fit_spec((*layers, *axes), leaf.shape, mesh.shape))

  return jax.tree_util.tree_map_with_path(sharding, state)


def fit_spec(
  axes: Sequence[AxisNames], shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
  """A spec of those axes that the mesh has and that divide their dimensions.

  >>> tuple(fitting((("data", "fsdp"), "model"), (8, 3), {"fsdp": 4, "model": 2}))
  ('fsdp', None)
  """
  spec = []
  for n, names in zip(shape, [*axes, *(None,) * (len(shape) - len(axes))]):
    kept = [name for name in ((names,) if isinstance(names, str) else names or ()) if name in sizes]
    while kept and n % math.prod(sizes[name] for name in kept):
      kept.pop()
    spec.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
  return PartitionSpec(*spec)


def constrain(x: Array, *axes: AxisNames) -> Array:
  """`x`, cut along `axes` in the mesh in use; as it was if there is none."""
  sizes = axis_sizes()
  return jax.lax.with_sharding_constraint(x, fit_spec(axes, x.shape, sizes)) if sizes else x


def param_spec(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
  """How a parameter is cut.

  >>> tuple(param_spec("transformer/layers/attention_1/out/kernel", (2, 8, 6), {"model": 2}))
  (None, 'model', None)
  """
  axes = next(axes for pattern, axes in PARAM_RULES if re.search(pattern, path))
  return fit_spec((None, *axes) if "/layers/" in path else axes, shape, sizes)


def train_state_shardings(shapes: Any, mesh: Mesh) -> Any:
  """Shardings of a `TrainState` of shapes: what the optimizer keeps of a parameter is cut like it.

  What it keeps in other shapes, such as Adafactor's factors, is on every device.
  """
  params = {
    f"{module}/{name}": leaf.shape
    for module, leaves in shapes.params.items()
    for name, leaf in leaves.items()
  }

  def sharding(path: Any, leaf: Any) -> NamedSharding:
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    name = "/".join(names[-2:])
    spec = PartitionSpec()
    if params.get(name) == leaf.shape:
      spec = param_spec(name, leaf.shape, mesh.shape)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, shapes)


def batch_sharding(mesh: Mesh, n_row: int) -> NamedSharding:
  """Of arrays [B, T] of tokens: rows are dealt out, and every device along `sequence` has them all."""
  return NamedSharding(mesh, fit_spec((BATCH_AXES,), (n_row, 1), mesh.shape))


def replicated(mesh: Mesh) -> NamedSharding:
  """Of what every device has all of."""
  return NamedSharding(mesh, PartitionSpec())


def process_share(mesh: Mesh | None, n_row: int) -> tuple[int, int]:
  """Which of how many equal shares of the rows of a batch this host needs."""
  if mesh is None:
    return 0, 1
  index = batch_sharding(mesh, n_row).addressable_devices_indices_map((n_row, 1)).values()
  starts, stops = zip(*((rows.start or 0, rows.stop or n_row) for rows, _ in index))
  mine = max(stops) - min(starts)
  if n_row % mine or min(starts) % mine:
    raise ValueError(
      f"mesh={dict(mesh.shape)} gives this host rows {min(starts)} to {max(stops)} of "
      f"{n_row}, which is no even share: let data and fsdp be multiples of the hosts."
    )
  return min(starts) // mine, n_row // mine


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, n_row: int) -> dict[str, Array]:
  """A global batch [B, T] on the devices, of which each host gives all rows or its share of them."""
  sharding = batch_sharding(mesh, n_row)

  def put(x: np.ndarray) -> Array:
    first = 0 if len(x) == n_row else process_share(mesh, n_row)[0] * len(x)

    def part(index: tuple[slice, ...]) -> np.ndarray:
      rows, columns = index
      stop = n_row if rows.stop is None else rows.stop
      return x[(rows.start or 0) - first : stop - first, columns]

    return jax.make_array_from_callback((n_row, x.shape[1]), sharding, part)

  return {name: put(np.asarray(x)) for name, x in batch.items()}
