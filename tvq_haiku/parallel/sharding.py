"""All rules for sharding arrays over a mesh of devices.

A mesh has some of these axes, for example `data:4,model:2`:
  data      splits the batch; parameters are replicated
  fsdp      splits the batch, and also parameters and optimizer state, which are gathered for use
  model     splits the key/value heads, or the value width if it does not divide the heads
  sequence  splits each sequence into consecutive shards: see `attention.sharded`
A dimension is not split over a mesh axis whose size does not divide the dimension's size.

Letters: B batch, T tokens, H query heads, G key/value heads, S codes per codebook, M memory length,
K key width, V value width, D model width, N layers, X vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import math
import re

import chex
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from tvq_haiku.types import Array, Tree

AxisNames = str | tuple[str, ...] | None  # the mesh axes that split one dimension of an array

MESH_AXES = ("data", "fsdp", "model", "sequence")
BATCH_AXES = ("data", "fsdp")  # split the batch
HEADS, WIDTH = "heads", "width"  # placeholders: `head_axes` gives "model" or None for each

# The table: for each dimension of an array, the mesh axes that split it.

# Parameters, by a pattern for "module/name"; the first match counts. The leading layer axis [N] of
# stacked parameters is omitted here and never split.
PARAM_RULES: tuple[tuple[str, tuple[AxisNames, ...]], ...] = (
  # [X, D]; the vocabulary over `model`, so that the logits of tied embeddings are split over it
  (r"embedding/embeddings", ("model", "fsdp")),
  # [D, X]; the same for untied embeddings
  (r"unembedding/kernel", ("fsdp", "model")),
  # [D, H·K]; heads over `model`
  (r"attention_\d/q/kernel", ("fsdp", "model")),
  # [D, G·K + G·V + H·V] with a gate, [D, G·K + G·V] without; columns are never split, because
  # shards of the fused kernel would not align with the boundaries between keys, values and gate
  (r"attention_\d/kvg?/kernel", (("fsdp", "model"), None)),
  # [D, G·K]; projects only the M+1 relative positions, so columns are not split
  (r"attention_\d/r/kernel", ("fsdp", None)),
  # [H·V, D]; rows over `model`, like the values that it projects
  (r"attention_\d/out/kernel", ("model", "fsdp")),
  # [D, F] with F hidden units of the MLP, over `model`
  (r"mlp/up/kernel", ("fsdp", "model")),
  # [F, D]; the same
  (r"mlp/down/kernel", ("model", "fsdp")),
  # gains, biases and codebooks; small, so replicated
  (r"", ()),
)
# Fields of `AttentionState`, `KeyValueState` and `TransformerState`, by name; a leading layer axis
# [N] is omitted here and never split. State is replicated over `sequence`.
STATE_RULES: Mapping[str, tuple[AxisNames, ...]] = {
  "document": (BATCH_AXES,),  # [B]
  "position": (BATCH_AXES,),  # [B]
  "memory_codes": (BATCH_AXES, HEADS, None),  # [B, G, M]
  "memory_keys": (BATCH_AXES, HEADS, None, None),  # [B, G, M, K]
  "memory_values": (BATCH_AXES, HEADS, None, WIDTH),  # [B, G, M, V]
  "memory_docs": (BATCH_AXES, None),  # [B, M]
  "cache_counts": (BATCH_AXES, HEADS, None),  # [B, G, S]
  "cache_means": (BATCH_AXES, HEADS, None, WIDTH),  # [B, G, S, V]
  "cache_doc": (BATCH_AXES,),  # [B]
}
# Arrays of a batch: [B, T], or features [B, T, D]. They are replicated over `sequence`; the model
# splits T over it.
BATCH_RULE: tuple[AxisNames, ...] = (BATCH_AXES, None)


def parse_mesh(text: str) -> dict[str, int]:
  """Returns the axes of a mesh and their sizes.

  Raises:
    ValueError: `text` is not a comma-separated list of AXIS:SIZE, or it repeats an axis.

  >>> parse_mesh("data:4,model:2")
  {'data': 4, 'model': 2}
  """
  sizes: dict[str, int] = {}
  for entry in text.split(","):
    name, _, size = entry.strip().partition(":")
    if name not in MESH_AXES or name in sizes or not re.fullmatch("[1-9][0-9]*", size):
      raise ValueError(
        f"mesh={text!r}: {entry!r} must be AXIS:SIZE, where AXIS is one of {', '.join(MESH_AXES)}, "
        "each at most once, and SIZE is a positive integer; for example data:4,model:2."
      )
    sizes[name] = int(size)
  return sizes


def make_mesh(text: str) -> Mesh:
  """Returns the mesh that a text such as `data:8` describes, over the first devices of JAX.

  Raises:
    ValueError: the text is malformed, there are too few devices, or several processes have devices
      that the mesh would not use.
  """
  sizes = parse_mesh(text)
  n_device, devices = math.prod(sizes.values()), jax.devices()
  if n_device > len(devices):
    hint = f" JAX_NUM_CPU_DEVICES={n_device} makes that many CPU devices."
    available = "1 is" if len(devices) == 1 else f"{len(devices)} are"
    raise ValueError(
      f"mesh={text!r} needs {n_device} devices, but only {available} available."
      + (hint if devices[0].platform == "cpu" else "")
    )
  if jax.process_count() > 1 and n_device < len(devices):
    raise ValueError(
      f"mesh={text!r} uses {n_device} of {len(devices)} devices. With several processes it must "
      "use all of them."
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices[:n_device],
  )


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
  """Sets the mesh that `constrain` and `axis_sizes` refer to while a function is traced."""
  return (
    contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
  )


def axis_sizes() -> Mapping[str, int]:
  """Returns the axes and sizes of the mesh that `use_mesh` has set; empty without a mesh."""
  return jax.sharding.get_abstract_mesh().shape


def per_device(n: int) -> int:
  """Returns how many of the n tokens of a batch one device holds, rounded up."""
  sizes = axis_sizes()
  return -(-n // math.prod(sizes.get(axis, 1) for axis in (*BATCH_AXES, "sequence")))


def head_axes(n_kv_head: int, sizes: Mapping[str, int] | None = None) -> dict[str, AxisNames]:
  """Returns the mesh axes that split key/value heads (HEADS) and the value width (WIDTH).

  Args:
    n_kv_head: G.
    sizes: axes and sizes of the mesh; None: those that `use_mesh` has set.

  >>> head_axes(4, {"model": 2}), head_axes(1, {"model": 2})
  ({'heads': 'model', 'width': None}, {'heads': None, 'width': 'model'})
  """
  sizes = axis_sizes() if sizes is None else sizes
  divides = n_kv_head % sizes.get("model", 1) == 0
  return {HEADS: "model" if divides else None, WIDTH: None if divides else "model"}


def fit_spec(
  axes: Sequence[AxisNames], shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
  """Returns the spec of an array, without mesh axes that are missing or do not divide a dimension.

  Args:
    axes: the mesh axes that should split each dimension; trailing dimensions may be omitted.
    shape: shape of the array.
    sizes: axes and sizes of the mesh.

  >>> tuple(fit_spec((("data", "fsdp"), "model"), (8, 3), {"fsdp": 4, "model": 2}))
  ('fsdp', None)
  """
  spec = []
  padded = [*axes, *(None,) * (len(shape) - len(axes))]
  for size, names in zip(shape, padded, strict=True):
    names = (names,) if isinstance(names, str) else names or ()
    kept = [name for name in names if name in sizes]
    while kept and size % math.prod(sizes[name] for name in kept):
      kept.pop()
    spec.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
  return PartitionSpec(*spec)


def constrain(x: Array, *axes: AxisNames) -> Array:
  """Returns `x`, constrained to be split by `axes`; unchanged outside of `use_mesh`."""
  sizes = axis_sizes()
  return jax.lax.with_sharding_constraint(x, fit_spec(axes, x.shape, sizes)) if sizes else x


def param_spec(path: str, shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
  """Returns the spec of a parameter according to `PARAM_RULES`.

  Args:
    path: "module/name".
    shape: shape of the parameter, with its layer axis if it has one.
    sizes: axes and sizes of the mesh.

  >>> tuple(param_spec("transformer/layers/attention_1/out/kernel", (2, 8, 6), {"model": 2}))
  (None, 'model', None)
  """
  axes = next(axes for pattern, axes in PARAM_RULES if re.search(pattern, path))
  return fit_spec((None, *axes) if "/layers/" in path else axes, shape, sizes)


def train_state_shardings(shapes: Tree, mesh: Mesh) -> Tree:
  """Returns the shardings of a `TrainState`.

  Optimizer state with the shape of a parameter is sharded like this parameter; other optimizer
  state, such as the factors of Adafactor, is replicated.

  Args:
    shapes: a `TrainState` of arrays or of `jax.ShapeDtypeStruct`.
    mesh: the devices.

  Returns:
    A `TrainState` of `NamedSharding`.
  """
  params = {
    f"{module}/{name}": leaf.shape
    for module, leaves in shapes.params.items()
    for name, leaf in leaves.items()
  }

  def leaf_sharding(path: jax.tree_util.KeyPath, leaf: Array) -> NamedSharding:
    keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    name = "/".join(keys[-2:])
    spec = PartitionSpec()
    if params.get(name) == leaf.shape:
      spec = param_spec(name, leaf.shape, mesh.shape)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(leaf_sharding, shapes)


def state_shardings(state: Tree, mesh: Mesh, n_kv_head: int) -> Tree:
  """Returns the shardings of a `TransformerState`.

  Args:
    state: a `TransformerState` of arrays or of `jax.ShapeDtypeStruct`.
    mesh: the devices.
    n_kv_head: G.

  Returns:
    A `TransformerState` of `NamedSharding`.
  """
  model_axes = head_axes(n_kv_head, mesh.shape)

  def leaf_sharding(path: jax.tree_util.KeyPath, leaf: Array) -> NamedSharding:
    axes = [
      model_axes.get(axis, axis) if isinstance(axis, str) else axis
      for axis in STATE_RULES[path[-1].name]
    ]
    layer_axes = (None,) * (len(leaf.shape) - len(axes))
    return NamedSharding(mesh, fit_spec((*layer_axes, *axes), leaf.shape, mesh.shape))

  return jax.tree_util.tree_map_with_path(leaf_sharding, state)


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
  """Returns the sharding of the arrays [B, T, ...] of a batch: see `BATCH_RULE`."""
  return NamedSharding(mesh, fit_spec(BATCH_RULE, (batch_size, 1), mesh.shape))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds completely."""
  return NamedSharding(mesh, PartitionSpec())


def process_share(mesh: Mesh | None, batch_size: int) -> tuple[int, int]:
  """Returns which share of the global batch this process has to provide.

  Args:
    mesh: the devices; None: one device.
    batch_size: B of the global batch.

  Returns:
    (i, n): the i-th of n equal shares, which holds batch elements i·B/n to (i+1)·B/n.

  Raises:
    ValueError: the batch elements on this process's devices are not one of n equal shares.
  """
  if mesh is None:
    return 0, 1
  sharding = batch_sharding(mesh, batch_size)
  indices = sharding.addressable_devices_indices_map((batch_size, 1)).values()
  start = min(elements.start or 0 for elements, _ in indices)
  stop = max(elements.stop or batch_size for elements, _ in indices)
  share = stop - start
  if batch_size % share or start % share:
    raise ValueError(
      f"mesh={dict(mesh.shape)} assigns batch elements {start} to {stop} of {batch_size} to this "
      "process, but the batch must be divided into equal shares. Make data·fsdp a multiple of the "
      "number of processes."
    )
  return start // share, batch_size // share


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, Array]:
  """Puts a batch on the devices of a mesh.

  Args:
    batch: name -> array, either of the global batch [B, T, ...] or of this process's share of it
      [B/n, T, ...]: see `process_share`.
    mesh: the devices.
    batch_size: B of the global batch.

  Returns:
    name -> global array [B, T, ...].
  """
  sharding = batch_sharding(mesh, batch_size)
  chex.assert_rank(list(batch.values()), {2, 3})

  def put(x: np.ndarray) -> Array:
    first = 0 if len(x) == batch_size else process_share(mesh, batch_size)[0] * len(x)

    def device_shard(index: tuple[slice, ...]) -> np.ndarray:
      elements, *rest = index
      stop = batch_size if elements.stop is None else elements.stop
      return x[(elements.start or 0) - first : stop - first, *rest]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, device_shard)

  return {name: put(np.asarray(x)) for name, x in batch.items()}
