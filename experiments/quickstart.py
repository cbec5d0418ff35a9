"""Trains a small byte-level Transformer-VQ on five novels and tests it on a sixth.

  python -m experiments.quickstart            # takes minutes on two CPU cores
  python -m experiments.quickstart --smoke    # checks everything in seconds

Ctrl-C stops the run and saves it; the same command resumes it. At the end, the command prints the
bits per byte of the held-out novel for the model, and for gzip, bzip2 and xz, which are given the
same training text. metrics.jsonl in the directory of the run holds the learning curve.
"""

from __future__ import annotations

from experiments import restart

if __name__ == "__main__":
  restart.restart_with_malloc_settings()  # before JAX is imported

from collections.abc import Mapping, Sequence
import pathlib
import shlex
from typing import NamedTuple

from absl import flags
import jax

from experiments import command_line, launcher
import tvq_haiku as tvq
from tvq_haiku import data
from tvq_haiku.data import austen_novels
from tvq_haiku.evaluation import baseline_compressors
from tvq_haiku.run import commands, metric_writers, trainer
from tvq_haiku.types import Params
from tvq_haiku.utils import files

_COMMAND = flags.DEFINE_enum(
  "command",
  "train",
  ("train", "export"),
  "train: train the model, or resume its training, and print the report. export: write the "
  "parameters to WORKDIR/params.safetensors.",
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory of the run. Default: runs/quickstart, or runs/quickstart-smoke with --smoke.",
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the initial parameters, the order of the data, and samples.", lower_bound=0
)
_SMOKE = flags.DEFINE_boolean(
  "smoke",
  False,
  "Use a tiny model and little text, to check in seconds that everything works. The results are "
  "meaningless.",
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
_SMOKE_BYTES = 50_000  # of each novel

_PROMPTS = (
  "It is a truth universally acknowledged, that ",
  "CHAPTER I\n\n",
  '"My dear Anne," said ',
)
_SAMPLE_BYTES = 300


class Novels(NamedTuple):
  """The novels to train on and the novel to test on."""

  training: Mapping[str, bytes]  # title -> text
  held_out: bytes  # the novel to test on


def main() -> None:
  """Trains, or resumes; when the training is complete, tests the model and prints a report.

  With --command=export, writes the parameters to a file instead.
  """
  smoke, seed = _SMOKE.value, _SEED.value
  config, train_cfg = (_SMOKE_MODEL, _SMOKE_TRAINING) if smoke else (_MODEL, _TRAINING)
  default_workdir = "runs/quickstart-smoke" if smoke else "runs/quickstart"
  workdir = pathlib.Path(_WORKDIR.value or default_workdir)
  report_file = workdir / "report.txt"
  if _COMMAND.value == "export":
    run = tvq.load_checkpoint(workdir)
    file = commands.export_params(workdir, run)
    print(f"Wrote the parameters after {int(run.train_state.step)} updates to {file}")
    return

  # -- data ------------------------------------------------------------------------------------
  novels = _load_novels(_SMOKE_BYTES if smoke else None)
  batches = data.PackedBatches(
    data.stream_of([data.ByteVocabulary.encode(text) for text in novels.training.values()]),
    seed=seed,
    batch_size=train_cfg.global_batch_size,
    sequence_len=train_cfg.sequence_len,
  )

  # -- training --------------------------------------------------------------------------------
  run = _train(config, train_cfg, batches, workdir, seed)
  n_update, n_all = int(run.train_state.step), train_cfg.n_update
  if n_update < n_all:
    resume = command_line.resume_command()
    print(f"Stopped after {n_update} of {n_all} updates and saved. To resume: {resume}")
    return
  if report_file.exists():
    print(report_file.read_text(encoding="utf-8", errors="surrogateescape"))
    another = "python -m experiments.quickstart" + (" --smoke" if smoke else "")
    another += f" --seed={seed + 1} --workdir=DIRECTORY"
    print(f"This run is complete. To start another one: {another}")
    return

  # -- evaluation and samples ------------------------------------------------------------------
  params = run.train_state.params
  table = _bits_per_byte(params, config, novels)
  passages = _sample(params, config, seed)
  n_param = sum(x.size for x in jax.tree.leaves(params))
  report = _describe(table, passages, novels, workdir, n_param=n_param, smoke=smoke)
  print(report, end="")
  files.write_atomically(report_file, report)


def _load_novels(n_byte: int | None) -> Novels:
  """Returns the novels, or the first `n_byte` bytes of each."""
  texts = austen_novels.austen()
  held_out = texts[austen_novels.HELD_OUT][:n_byte]
  return Novels(
    {title: text[:n_byte] for title, text in texts.items() if title != austen_novels.HELD_OUT},
    held_out,
  )


def _train(
  config: tvq.TransformerConfig,
  train_cfg: tvq.TrainConfig,
  batches: data.PackedBatches,
  workdir: pathlib.Path,
  seed: int,
) -> tvq.Checkpoint:
  """Trains, or resumes, and returns the last checkpoint; records metrics of the training.

  Args:
    config: the model's configuration.
    train_cfg: the training's configuration.
    batches: the training batches.
    workdir: directory of the run.
    seed: seed of the initial parameters.
  """
  with commands.lock(files.prepare_directory(workdir)):
    checkpoint = trainer.resume_or_initialize(config, train_cfg, workdir, seed=seed)
    step = int(checkpoint.train_state.step)
    with metric_writers.open_writers(workdir, step=step, tensorboard=False) as writers:
      return trainer.fit(
        config,
        train_cfg,
        batches,
        workdir,
        seed=seed,
        checkpoint=checkpoint,
        record=writers.write,
      )


def _bits_per_byte(
  params: Params, config: tvq.TransformerConfig, novels: Novels
) -> dict[str, float]:
  """Returns the bits per byte of the held-out novel, for the model and for each compressor.

  Args:
    params: the model's parameters.
    config: the model's configuration.
    novels: the training novels, which the compressors may refer to, and the held-out novel.
  """
  stream = data.stream_of([data.ByteVocabulary.encode(novels.held_out)])
  likelihood = tvq.evaluate(params, config, stream, show_progress=True)
  table = {"tvq_haiku": likelihood.bits_per(len(novels.held_out))}
  training_text = b"".join(novels.training.values())
  for name, compress in baseline_compressors.COMPRESSORS.items():
    table[name] = baseline_compressors.bits_per_byte(compress, training_text, novels.held_out)
  return table


def _sample(params: Params, config: tvq.TransformerConfig, seed: int) -> list[str]:
  """Returns the text that the model samples after each of the prompts."""
  return tvq.continue_text(
    params,
    config,
    _PROMPTS,
    max_new_tokens=_SAMPLE_BYTES,
    rng=jax.random.key(seed),
    temperature=0.8,
    top_p=0.95,
  )


def _describe(
  table: Mapping[str, float],
  passages: Sequence[str],
  novels: Novels,
  workdir: pathlib.Path,
  *,
  n_param: int,
  smoke: bool,
) -> str:
  """Returns the report.

  Args:
    table: name of a compressor -> bits per byte of the held-out novel.
    passages: the text sampled after each of the prompts.
    novels: the novels, of which the report names the held-out one.
    workdir: directory of the run.
    n_param: number of parameters of the model.
    smoke: whether this was a smoke run.
  """
  lines = []
  if smoke:
    lines += ["This was a smoke run: a tiny model that has learned almost nothing.", ""]
  lines += [
    f"Bits per byte of {austen_novels.HELD_OUT} ({len(novels.held_out):,} bytes, not seen in "
    f"training), after training on {len(novels.training)} other novels:",
    "",
    *(f"  {name:<12}{bits:7.3f}" for name, bits in table.items()),
    "",
    f"The {n_param:,} parameters of the model are not counted. Samples of the model, with the "
    "prompts in brackets:",
    "",
  ]
  for prompt, passage in zip(_PROMPTS, passages, strict=True):
    lines.append(f"  [{prompt}]{passage}\n".replace("\n", "\n  "))
  lines += [
    f"The checkpoint is in {workdir}. To sample more:",
    f"  python -m experiments.sample --workdir={shlex.quote(str(workdir))} --prompt='The Admiral '",
    "",
  ]
  return "\n".join(lines)


if __name__ == "__main__":
  launcher.launch("quickstart", main)
