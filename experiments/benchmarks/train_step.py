"""How fast a training step is, by length, reduction, head type and what is computed again.

  python -m experiments.benchmarks.train_step                                # T = 2048
  python -m experiments.benchmarks.train_step --seq_lens=8192,32768 --full --rounds=3
  python -m experiments.benchmarks.train_step --peer=dense

All cases alternate in one process with a square matrix product, the machine's peak.
"""

from __future__ import annotations

import pathlib

from absl import flags
import jax

from experiments import launcher
from experiments.benchmarks import dense, measure
import tvq_haiku as tvq
from tvq_haiku.evaluation import flops
from tvq_haiku.training import optimizers
from tvq_haiku.utils import files

_SIZE = flags.DEFINE_enum(
  "size",
  "cpu",
  ["cpu", "paper"],
  "cpu: 2 layers of width 256, batch 1, float32; paper: 24 layers of width 768, batch 8, bfloat16.",
)
_SEQ_LENS = flags.DEFINE_list("seq_lens", ["2048"], "T: tokens of a sequence, read in one update.")
_HEAD_TYPES = flags.DEFINE_list("head_types", ["shga"], "shga, mha, mqa.")
_REDUCTIONS = flags.DEFINE_list("reductions", ["auto"], "scan, serial, matmul, assoc_scan, auto.")
_REMATS = flags.DEFINE_list("remats", ["auto"], "none, block, dots, layer, auto.")
_FULL = flags.DEFINE_boolean("full", False, "Also full attention over all T tokens.")
_PEER = flags.DEFINE_enum(
  "peer", None, ["dense"], "Also a plain transformer of as many parameters."
)
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Calls of each case.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "Where to write the rows; none: nowhere.")
_SMOKE = flags.DEFINE_boolean("smoke", False, "Tiny models, once: the path, not the result.")

_NAMES = ("T", "model", "head_type", "reduction", "remat")


def main() -> None:
  if _JSON.value:  # before the work, not after it
    files.prepare_directory(pathlib.Path(_JSON.value).parent)
  lengths = (
    [32] if _SMOKE.value else [launcher.parse_positive("seq_lens", x) for x in _SEQ_LENS.value]
  )
  cases = [case for length in lengths for case in _cases(_config(), length)]
  rows = measure.compare(
    cases,
    rounds=1 if _SMOKE.value else _ROUNDS.value,
    dtype=_config().compute_dtype,
    peak_size=64 if _SMOKE.value else None,
  )
  print(f"peak of a square product: {rows[-1]['peak_gflops']:.0f} GFLOP/s")
  measure.print_table(rows, _NAMES)
  if _JSON.value:
    measure.write_json(_JSON.value, rows, benchmark="train_step", size=_SIZE.value)


def _config() -> tvq.TransformerConfig:
  if _SMOKE.value:
    return tvq.TransformerConfig.tiny(n_layer=1)
  if _SIZE.value == "cpu":
    return tvq.TransformerConfig(n_vocab=259)
  return tvq.TransformerConfig.enwik8(p_dropsin=0.0, p_dropres=0.0, p_droplyr=0.0)


def _cases(sizes: tvq.TransformerConfig, length: int) -> list[measure.Case]:
  cases = []
  for head_type in _HEAD_TYPES.value:
    config = _with_heads(sizes, head_type)
    for reduction in _REDUCTIONS.value:
      for remat in _REMATS.value:
        cases.append(_quantized(config.replace(reduction=reduction, remat=remat), length))
    if _FULL.value:
      cases.append(_quantized(config.replace(attn_type="full", mem_len=length), length))
  if _PEER.value:
    cases.append(_peer(sizes, length))
  return cases


def _with_heads(config: tvq.TransformerConfig, head_type: str) -> tvq.TransformerConfig:
  if head_type == "shga":
    return config
  return config.replace(head_type=head_type, n_head=config.d_model // config.d_k, d_v=config.d_k)


def _train_config(length: int) -> tvq.TrainConfig:
  batch = 1 if _SIZE.value == "cpu" else 8
  return tvq.TrainConfig(sequence_len=length, update_len=length, global_batch_size=batch)


def _batch(config: tvq.TransformerConfig, length: int) -> dict[str, jax.Array]:
  shape = (_train_config(length).global_batch_size, length + 1)
  tokens = jax.random.randint(jax.random.key(0), shape, 0, config.n_vocab)
  return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def _quantized(config: tvq.TransformerConfig, length: int) -> measure.Case:
  train_cfg, batch, rng = _train_config(length), _batch(config, length), jax.random.key(1)
  state = tvq.init_train_state(config, train_cfg, rng)
  program, seconds, temp = measure.compiled(
    tvq.make_train_step(config, train_cfg), state, batch, rng, donate_argnums=0
  )
  box = [state]

  def run():
    box[0], metrics = program(box[0], batch, rng)
    return box[0], metrics

  settings = dict(
    T=length,
    model=config.attn_type,
    head_type=config.head_type,
    reduction=config.reduction if config.attn_type == "vq" else "-",
    remat=config.remat,
  )
  return _case(settings, run, length, flops.forward_multiply_adds(config, length), seconds, temp)


def _peer(config: tvq.TransformerConfig, length: int) -> measure.Case:
  n_parameter = sum(x.size for x in jax.tree.leaves(tvq.params_shapes(config)))
  n_layer = dense.layers_of_equal_size(config, n_parameter)
  init, step = dense.make_peer_step(
    config, n_layer, optimizers.make_optimizer(_train_config(length))
  )
  batch = _batch(config, length)
  state = jax.jit(init)(jax.random.key(0))
  program, seconds, temp = measure.compiled(step, state, batch, donate_argnums=0)
  box = [state]

  def run():
    box[0], loss = program(box[0], batch)
    return box[0], loss

  settings = dict(
    T=length, model=f"dense, {n_layer} layers", head_type="mha", reduction="-", remat="none"
  )
  return _case(
    settings, run, length, dense.forward_multiply_adds(config, n_layer, length), seconds, temp
  )


def _case(
  settings, run, length: int, multiply_adds: int, seconds: float, temp: int
) -> measure.Case:
  batch = _train_config(length).global_batch_size
  return measure.Case(
    " ".join(map(str, settings.values())),
    settings,
    run,
    batch * length,
    6.0 * batch * multiply_adds,
    seconds,
    temp,
  )


if __name__ == "__main__":
  launcher.launch("train_step", main)
