"""Measures training steps of models that differ in sequence length, head type, reduction or remat.

  python -m experiments.benchmarks.train_step                                # T = 2048
  python -m experiments.benchmarks.train_step --seq_lens=8192,32768 --full --rounds=3
  python -m experiments.benchmarks.train_step --peer=dense

The cases alternate in one process with a product of square matrices, whose speed is taken as the
peak speed of the machine.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from collections.abc import Callable
import pathlib
from typing import NamedTuple

from absl import flags
import jax

from experiments import launcher
from experiments.benchmarks import dense, measure
import tvq_haiku as tvq
from tvq_haiku.evaluation import flops
from tvq_haiku.training import optimizers
from tvq_haiku.types import ArrayTree, Batch
from tvq_haiku.utils import files

_SIZE = flags.DEFINE_enum(
  "size",
  "cpu",
  ["cpu", "paper"],
  "cpu: 2 layers of width 256, batch size 1, float32. paper: 24 layers of width 768, batch size 8, "
  "bfloat16.",
)
_SEQ_LENS = flags.DEFINE_list(
  "seq_lens",
  ["2048"],
  "Sequence lengths T in tokens; each call makes one update on complete sequences.",
)
_HEAD_TYPES = flags.DEFINE_list("head_types", ["shga"], "Head types: shga, mha, mqa.")
_REDUCTIONS = flags.DEFINE_list(
  "reductions", ["auto"], "Reductions: scan, serial, matmul, assoc_scan, auto."
)
_REMATS = flags.DEFINE_list(
  "remats", ["auto"], "Kinds of rematerialization: none, block, dots, layer, auto."
)
_FULL = flags.DEFINE_boolean(
  "full", False, "Whether to measure quadratic attention over all T tokens, too."
)
_PEER = flags.DEFINE_enum(
  "peer", None, ["dense"], "Also measure a plain transformer with the same number of parameters."
)
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Number of measured calls of each case.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File to write the results to. Default: none.")
_SMOKE = flags.DEFINE_boolean(
  "smoke", False, "Measure tiny models once, to check that the benchmark works."
)

_COLUMNS = ("T", "model", "head_type", "reduction", "remat")
_SMOKE_LENGTH = 32


class Size(NamedTuple):
  """Settings that all cases share."""

  config: tvq.TransformerConfig
  batch_size: int


def main() -> None:
  """Prints the table, and writes it to --json."""
  smoke, size = _SMOKE.value, _select_size()
  if _JSON.value:  # fails before the measurements, not after them
    files.prepare_directory(pathlib.Path(_JSON.value).parent)
  lengths = [launcher.parse_positive("seq_lens", text) for text in _SEQ_LENS.value]
  cases = []
  for length in [_SMOKE_LENGTH] if smoke else lengths:
    for head_type in _HEAD_TYPES.value:
      heads = _with_head_type(size.config, head_type)
      configs = [
        heads.replace(reduction=reduction, remat=remat)
        for reduction in _REDUCTIONS.value
        for remat in _REMATS.value
      ]
      if _FULL.value:
        configs.append(heads.replace(attn_type="full", mem_len=length))
      cases += [_make_case(config, size.batch_size, length) for config in configs]
    if _PEER.value:
      cases.append(_make_peer_case(size.config, size.batch_size, length))
  rows = measure.compare(
    cases,
    rounds=1 if smoke else _ROUNDS.value,
    dtype=size.config.compute_dtype,
    peak_size=64 if smoke else None,
  )
  print(f"peak speed (square matrix product): {rows[-1]['peak_gflops']:.0f} GFLOP/s")
  measure.print_table(rows, _COLUMNS)
  if _JSON.value:
    measure.write_json(_JSON.value, rows, benchmark="train_step", size=_SIZE.value)


def _select_size() -> Size:
  """Returns the model and the batch size that --size and --smoke select."""
  batch_size = 1 if _SIZE.value == "cpu" else 8
  if _SMOKE.value:
    return Size(tvq.TransformerConfig.tiny(n_layer=1), batch_size)
  if _SIZE.value == "cpu":
    return Size(tvq.TransformerConfig(n_vocab=259), batch_size)
  no_dropout = dict(p_dropsin=0.0, p_dropres=0.0, p_droplyr=0.0)
  return Size(tvq.TransformerConfig.enwik8(**no_dropout), batch_size)


def _with_head_type(config: tvq.TransformerConfig, head_type: str) -> tvq.TransformerConfig:
  """Returns `config` with a head type; mha and mqa have heads of width K for keys and values."""
  if head_type == "shga":
    return config
  return config.replace(head_type=head_type, n_head=config.d_model // config.d_k, d_v=config.d_k)


def _train_config(batch_size: int, length: int) -> tvq.TrainConfig:
  return tvq.TrainConfig(sequence_len=length, update_len=length, global_batch_size=batch_size)


def _random_batch(config: tvq.TransformerConfig, batch_size: int, length: int) -> Batch:
  shape = (batch_size, length + 1)
  tokens = jax.random.randint(jax.random.key(0), shape, 0, config.n_vocab)
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


class _Repeated:
  """Calls a training step again and again; each call continues from the state of the last one."""

  def __init__(
    self, step: Callable[..., tuple[ArrayTree, ArrayTree]], state: ArrayTree, *inputs: ArrayTree
  ):
    self._step, self._state, self._inputs = step, state, inputs

  def __call__(self) -> ArrayTree:
    self._state, metrics = self._step(self._state, *self._inputs)
    return self._state, metrics


def _make_case(config: tvq.TransformerConfig, batch_size: int, length: int) -> measure.Case:
  """Returns the case of one training step of this library."""
  train_cfg, rng = _train_config(batch_size, length), jax.random.key(1)
  inputs = (_random_batch(config, batch_size, length), rng)
  state = tvq.init_train_state(config, train_cfg, rng)
  step = tvq.make_train_step(config, train_cfg)
  compiled = measure.compile_program(step, state, *inputs, donate_argnums=0)
  settings = dict(
    T=length,
    model=config.attn_type,
    head_type=config.head_type,
    reduction=config.reduction if config.attn_type == "vq" else "-",
    remat=config.remat,
  )
  return measure.Case(
    name=" ".join(map(str, settings.values())),
    settings=settings,
    run=_Repeated(compiled.program, state, *inputs),
    n_token=batch_size * length,
    model_flops=6.0 * batch_size * flops.forward_multiply_adds(config, length),
    compile_seconds=compiled.seconds,
    temp_bytes=compiled.temp_bytes,
  )


def _make_peer_case(config: tvq.TransformerConfig, batch_size: int, length: int) -> measure.Case:
  """Returns the case of one training step of a plain transformer of the same size."""
  n_param = sum(x.size for x in jax.tree.leaves(tvq.params_shapes(config)))
  n_layer = dense.layers_of_equal_size(config, n_param)
  optimizer = optimizers.make_optimizer(_train_config(batch_size, length))
  init, step = dense.make_peer_step(config, n_layer, optimizer)
  batch = _random_batch(config, batch_size, length)
  state = jax.jit(init)(jax.random.key(0))
  compiled = measure.compile_program(step, state, batch, donate_argnums=0)
  settings = dict(
    T=length, model=f"dense, {n_layer} layers", head_type="mha", reduction="-", remat="none"
  )
  return measure.Case(
    name=" ".join(map(str, settings.values())),
    settings=settings,
    run=_Repeated(compiled.program, state, batch),
    n_token=batch_size * length,
    model_flops=6.0 * batch_size * dense.forward_multiply_adds(config, n_layer, length),
    compile_seconds=compiled.seconds,
    temp_bytes=compiled.temp_bytes,
  )


if __name__ == "__main__":
  launcher.launch("train_step", main)
