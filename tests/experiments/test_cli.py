"""Flags of the experiments on the command line, and --command=info."""

import os
import re

import pytest

from launching import assert_fails_in_one_line, run, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
  "name, n_param",
  [("enwik8", "187,679,750"), ("pg19", "1,314,659,584"), ("imagenet64", "1,249,622,276")],
)
def test_info_describes_the_models_of_the_paper(workspace, name, n_param):
  status, out, err = run(f"python -m experiments.{name} --command=info", workspace)
  assert status == 0 and not err, err
  assert re.search(rf"Parameters: +{n_param}\n", out)
  assert re.search(r"n_code +512\n", out) and "FLOPs per token" in out
  assert "set --data_dir to see its statistics" in out


def test_info_describes_a_mesh_of_more_devices_than_there_are(workspace):
  command = "python -m experiments.pg19 --smoke --command=info --mesh=fsdp:4 --workdir=mesh"
  status, out, err = run(command, workspace)
  assert status == 0 and "On fsdp:4, each of 4 devices:" in out, err
  assert re.search(r"train +80,000 bytes\n", out)
  command = "python -m experiments.pg19 --command=info --config.remat=layer --mesh=fsdp:64"
  status, out, err = run(command, workspace)
  assert status == 0 and "On fsdp:64, each of 64 devices:" in out and "fsdp 10.35" in out, err


def test_info_shows_changed_fields_and_counts_the_data(workspace):
  status, out, err = run(
    "python -m experiments.text --smoke --command=info --workdir=t --cache_dir=cache "
    "--config.grad_clip=none --config.agg_cache=false --config.lr_max=1e-3",
    workspace,
  )
  assert status == 0 and re.search(r"train +54,048 tokens +1 documents +54,047 bytes", out), err
  assert re.search(r"grad_clip +None\n", out) and re.search(r"agg_cache +False\n", out)
  assert re.search(r"lr_max +0.001\n", out)


def test_info_without_a_vocabulary_counts_bytes(workspace):
  status, out, err = run(
    "python -m experiments.pg19 --smoke --command=info --workdir=fresh --config.n_max_step=30",
    workspace,
  )
  assert status == 0 and not err and re.search(r"validation +20,000 bytes\n", out), err
  assert "first train the vocabulary fresh/vocab.model with --command=train_vocab" in out
  assert re.search(r"n_warmup_step +3\n", out)


@pytest.fixture
def no_home(tmp_path):
  """The environment of a user who has neither $HOME nor an entry in the user database."""
  (tmp_path / "sitecustomize.py").write_text("import pwd\npwd.getpwuid = {}.__getitem__\n")
  removed = ("HOME", "XDG_CACHE_HOME")
  environment = {name: value for name, value in os.environ.items() if name not in removed}
  path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
  return environment | {"PYTHONPATH": os.pathsep.join(path)}


def test_help_lists_all_flags_with_the_defaults_of_each_size(workspace, no_home):
  status, out, err = run("python -m experiments.enwik8 --help", workspace, env=no_home)
  assert not err, (status, err)
  text = " ".join(out.split())
  assert "--n_byte: Expected size of the file in bytes" in text
  assert "--[no]smoke: Use a tiny model" in text and "--top_k: Number of most likely" in text
  width = "--config.d_model: Model width D; must be even. (default: paper 768, cpu 256, smoke 32)"
  assert width in text


@pytest.mark.parametrize(
  "command, status, message",
  [
    ("enwik8 --config.d_modell=3", 2, "Unknown command line flag 'config.d_modell'"),
    ("enwik8 --config.d_model=big", 2, "config.d_model=big"),
    ("enwik8 --config.agg_cache=perhaps", 2, "must be true or false"),
    ("enwik8 --command=fly", 2, "command"),
    ("enwik8 --smoke --config.block_len=0", 2, "block_len=0: must be at least 1"),
    ("enwik8", 1, "--data_dir is missing. Expected: the file enwik8, 100,000,000 bytes"),
    ("enwik8 --data_dir=nowhere", 1, "--data_dir=nowhere does not exist. Expected"),
    ("enwik8 --size=cpu --data_dir=README.md --workdir=new", 1, "README.md has"),
    ("enwik8 --smoke --data_dir=README.md", 2, "--smoke uses data of its own"),
    ("enwik8 --smoke --workdir=README.md/run", 1, "cannot write to the directory"),
    ("enwik8 --command=train_vocab --data_dir=README.md", 2, "the tokens are bytes"),
    ("enwik8 --seed=18446744073709551616", 2, "seed"),
    (
      "enwik8 --command=test --workdir=nowhere --data_dir=README.md",
      1,
      "nowhere holds no checkpoint",
    ),
    ("enwik8 --command=test --mesh=data:2", 2, "--command=test uses one device"),
    ("enwik8 --smoke --n_process=2", 2, "need --multihost"),
    (
      "imagenet64 --vocab=x.model --smoke",
      2,
      "--vocab=x.model: the tokens of imagenet64 are bytes",
    ),
    (
      "pg19 --data_dir=experiments",
      1,
      "has no train or validation or test. Expected: the directories",
    ),
    ("pg19 --vocab=nowhere.model --smoke --workdir=v", 1, "nowhere.model does not exist"),
    ("pg19 --vocab=README.md --smoke --workdir=v", 1, "README.md is not a SentencePiece model"),
    ("pg19 --command=sample --workdir=nowhere", 1, "nowhere holds no checkpoint"),
    ("imagenet64 --data_dir=experiments", 1, "has no train_data_batch_*.npz. Expected"),
    (
      "imagenet64 --smoke --config.sequence_len=96 --workdir=v",
      1,
      "must be a multiple of 192",
    ),
    ("text --data_dir=nowhere", 1, "--data_dir=nowhere does not exist. Expected: a text file"),
  ],
)
def test_wrong_input_is_reported_in_one_line(workspace, command, status, message):
  assert_fails_in_one_line(f"{command} --cache_dir=cache", workspace, status, message)
  assert not (workspace / "new" / "checkpoints").exists()
