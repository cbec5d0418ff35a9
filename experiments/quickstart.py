"""Trains a small byte-level Transformer-VQ on five novels and tests it on a sixth.

  python -m experiments.quickstart            # minutes on two CPU cores
  python -m experiments.quickstart --smoke    # the same path in seconds

It can be stopped (Ctrl-C) and started again at any time, and ends with a table: bits per byte of
the unseen novel beside what gzip, bzip2 and xz need for it, given the same training text.
"""

from __future__ import annotations

import pathlib
import shlex

from absl import flags
import jax

from experiments import launcher
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import austen_novels
from tvq_haiku.evaluation import baseline_compressors
from tvq_haiku.run import trainer
from tvq_haiku.utils import files

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the run; default runs/quickstart, or runs/quickstart-smoke."
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seeds parameters, the order of the data and samples.", lower_bound=0
)
_SMOKE = flags.DEFINE_boolean(
  "smoke", False, "A tiny model and little text: the path, not the result."
)

_MODEL = tvq.TransformerConfig(
  n_vocab=259,
  d_model=192,
  d_k=32,
  d_v=384,
  n_code=64,
  n_layer=1,
  block_len=64,
  mem_len=64,
  remat="none",
)
_TRAINING = tvq.TrainConfig(
  lr_max=4e-3,
  n_warmup_step=100,
  n_max_step=3200,
  sequence_len=2048,
  update_len=512,
  global_batch_size=2,
)
_SMOKE_MODEL = tvq.TransformerConfig.tiny(n_layer=1, remat="none")
_SMOKE_TRAINING = _TRAINING.replace(
  n_max_step=20, n_warmup_step=5, sequence_len=64, update_len=64, global_batch_size=4
)
_SMOKE_BYTES = 50_000

_PROMPTS = (
  "It is a truth universally acknowledged, that ",
  "CHAPTER I\n\n",
  '"My dear Anne," said ',
)
_SAMPLE_BYTES = 300


def main() -> None:
  smoke = _SMOKE.value
  config, train_cfg = (_SMOKE_MODEL, _SMOKE_TRAINING) if smoke else (_MODEL, _TRAINING)
  workdir = pathlib.Path(
    _WORKDIR.value or ("runs/quickstart-smoke" if smoke else "runs/quickstart")
  )
  report_file = workdir / "report.txt"

  # -- data: five novels to learn from, one to be tested on ------------------------------------
  limit = _SMOKE_BYTES if smoke else None
  novels = {title: text[:limit] for title, text in austen_novels.austen().items()}
  held_out = novels.pop(austen_novels.HELD_OUT)
  encode = data.ByteVocabulary.encode
  batches = data.PackedBatches(
    data.stream_of([encode(text) for text in novels.values()]),
    seed=_SEED.value,
    batch_size=train_cfg.global_batch_size,
    sequence_len=train_cfg.sequence_len,
  )

  # -- train, or go on, or find it done --------------------------------------------------------
  run = trainer.fit(config, train_cfg, batches, workdir, seed=_SEED.value, token_name="byte")
  command = "python -m experiments.quickstart" + (" --smoke" if smoke else "")
  made = int(run.train_state.step)
  if made < train_cfg.n_max_step:
    again = command + (f" --seed={_SEED.value}" if _SEED.value else "")
    again += f" --workdir={shlex.quote(_WORKDIR.value)}" if _WORKDIR.value else ""
    print(f"Stopped after {made} of {train_cfg.n_max_step} updates and saved. To go on: {again}")
    return
  if report_file.exists():
    print(report_file.read_text(), end="")
    print(
      f"\nThis run is done. To start another: {command} --seed={_SEED.value + 1} --workdir=DIRECTORY"
    )
    return

  # -- test on all of the sixth novel ----------------------------------------------------------
  params = run.train_state.params
  likelihood = tvq.evaluate(config, params, data.stream_of([encode(held_out)]), show_progress=True)
  table = {"tvq_haiku": likelihood.bits_per(len(held_out))}
  for name, compress in baseline_compressors.COMPRESSORS.items():
    table[name] = baseline_compressors.bits_per_byte(compress, b"".join(novels.values()), held_out)

  # -- write -----------------------------------------------------------------------------------
  passages = tvq.continue_text(
    params,
    config,
    _PROMPTS,
    max_new_tokens=_SAMPLE_BYTES,
    rng=jax.random.key(_SEED.value),
    temperature=0.8,
    top_p=0.95,
  )
  n_params = sum(x.size for x in jax.tree.leaves(params))
  small = (
    ["This is the smoke test: a tiny model that has learned nothing yet.", ""] if smoke else []
  )
  report = "\n".join(
    [
      *small,
      f"Bits per byte of {austen_novels.HELD_OUT} ({len(held_out):,} bytes, never seen), after training "
      f"on {len(novels)} other novels:",
      "",
      *(f"  {name:<12}{bits:7.3f}" for name, bits in table.items()),
      "",
      f"The model's {n_params:,} parameters are not counted. It writes:",
      "",
      *(
        f"  [{prompt}]{passage}\n".replace("\n", "\n  ")
        for prompt, passage in zip(_PROMPTS, passages)
      ),
      f"The checkpoint lies in {workdir}. To write more:",
      f"  python -m experiments.sample --checkpoint={shlex.quote(str(workdir))} --prompt='The Admiral '",
      "",
    ]
  )
  print(report, end="")
  files.write_atomically(report_file, report)


if __name__ == "__main__":
  launcher.launch("quickstart", main)
