"""The paper's experiments, as a user starts them."""

import json
import pathlib
import re
import shlex
import signal
import time

import pytest

from launching import place, run, start

assert place  # a fixture

BOOKS = "python -m experiments.pg19 --smoke --workdir=books --cache_dir=cache"
PIXELS = "python -m experiments.imagenet64 --smoke --workdir=pixels --cache_dir=cache"
TEXT = "python -m experiments.enwik8 --smoke --workdir=wiki --cache_dir=cache"


@pytest.fixture(scope="module")
def books(place):
  """Killed and started again: it goes on from its last checkpoint."""
  command = (
    BOOKS + " --config.n_max_step=60 --config.n_warmup_step=5 --save_seconds=0 --log_every=4"
  )
  process = start(command, place)
  saved = place / "books" / "checkpoints"
  for line in process.stderr:
    if (
      "training" in line and saved.exists() and any(path.name.isdigit() for path in saved.iterdir())
    ):
      break
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  status, out, err = run(command, place)
  assert status == 0, err
  return out, err


def test_books_from_files_to_figures(books, place):
  out, err = books
  first = int(re.search(r"training (\d+)/60", err)[1])
  assert first > 1 and f"going on after {first - 1} of 60 updates" in err
  assert "encoding" not in err and "vocabulary" not in err  # that was done
  lines = [
    json.loads(line) for line in (place / "books" / "metrics.jsonl").read_text().splitlines()
  ]
  assert [line["step"] for line in lines if "loss_lm" in line] == list(range(4, 61, 4))
  assert "Best on validation" in out
  commands = re.findall(r"^To .*?: +(python .*)$", out, re.M)
  assert [shlex.split(command)[-1] for command in commands] == [
    "--command=test",
    "--command=sample",
  ]
  status, out, err = run(commands[0], place)
  assert status == 0, err
  assert re.search(
    r"test: word_perplexity [\d.e+]+, bits_per_byte \d\.\d+, loss_lm \d\.\d+ nats", out
  )
  status, out, err = run(commands[1] + " --prompt='It was ' --length=20", place)
  assert status == 0 and out.startswith("It was ") and "samples/step-" in out, err
  status, out, err = run(BOOKS + " --config.d_model=64", place)  # another configuration
  assert status == 1 and not out and "d_model=32 there, 64 now" in err, err
  assert "n_max_step=60 there, 20 now" in err
  assert len(err.splitlines()) == 1, err


def test_parameters_are_exported_and_begun_with(books, place):
  status, out, err = run(BOOKS + " --command=export", place)
  assert status == 0 and "Written to books/params.safetensors, after " in out, err
  short = (
    BOOKS.replace("=books", "=again") + " --vocab=books/vocab.model --init=books/params.safetensors"
  )
  status, out, err = run(short + " --config.n_max_step=4 --config.n_warmup_step=0", place)
  assert status == 0, err
  lines = [
    json.loads(line) for line in (place / "again" / "metrics.jsonl").read_text().splitlines()
  ]
  before = [
    json.loads(line) for line in (place / "books" / "metrics.jsonl").read_text().splitlines()
  ]
  assert lines[-1]["validation_loss_lm"] < 0.9 * before[0]["loss_lm"]  # it does not begin anew
  status, out, err = run(short.replace("=again", "=other") + " --config.d_model=64", place)
  assert status == 1 and len(err.splitlines()) == 1, err
  assert "--init=books/params.safetensors: params do not fit this config" in err
  status, out, err = run(
    short.replace("params.safetensors", "vocab.model") + " --workdir=third", place
  )
  assert (
    status == 1 and len(err.splitlines()) == 1 and "does not hold the parameters of a model" in err
  )


def test_a_number_that_is_none_ends_the_run_in_one_line(place):
  command = TEXT.replace("=wiki", "=nan") + " --config.lr_max=1e30 --config.grad_clip=none"
  status, _, err = run(command + " --config.n_warmup_step=0 --debug_nans", place)
  assert status == 1 and "Traceback" not in err, err
  assert (
    "is skipped: loss" in err and "the first that is not finite is the " in err.splitlines()[-1]
  )


def test_info_of_a_mesh(place):
  status, out, err = run(
    "python -m experiments.pg19 --command=info --config.remat=layer --mesh=fsdp:64", place
  )
  assert status == 0 and "On fsdp:64, each of 64 devices:" in out and "fsdp 10.35" in out, err


def test_images_are_measured_and_drawn(place):
  status, out, err = run(PIXELS, place)
  assert status == 0 and "Best on validation" in out, err
  status, out, err = run(
    PIXELS + " --command=validation --weights=last --precision=bfloat16", place
  )
  assert status == 0 and re.search(r"validation: bits_per_dim \d\.\d{4}, loss_lm", out), err
  status, out, err = run(PIXELS + " --command=sample --images=2", place)
  assert status == 0 and pathlib.Path(place / out.split()[-1]).suffix == ".png", err


def test_interrupted_before_it_has_begun(place):
  process = start(TEXT.replace("=wiki", "=early") + " --config.n_layer=4", place)
  while "encoding" not in process.stderr.readline():
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert (process.returncode, err.splitlines()[-1]) == (130, "enwik8: interrupted.") or (
    process.returncode == 0 and "Stopped after" in out
  ), err


def test_interrupted_text_says_how_to_go_on(place):
  command = TEXT + " --config.n_max_step=2000"
  process = start(command, place)
  while "training" not in process.stderr.readline():
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  assert re.search(
    r"Stopped after \d+ of 2000 updates and saved. To go on: " + re.escape(command), out
  )


def test_a_second_interrupt_ends_at_once_and_leaves_what_was_saved(place):
  command = TEXT.replace("=wiki", "=twice") + " --config.n_max_step=40000 --save_seconds=0"
  process = start(command, place)
  saved = place / "twice" / "checkpoints"
  while not (saved.exists() and any(path.name.isdigit() for path in saved.iterdir())):
    assert process.poll() is None
    time.sleep(0.01)
  while process.poll() is None:  # the first asks, the next ends it, wherever it is
    process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == -signal.SIGINT and "Stopped" not in out and "nterrupt" not in err, (
    err
  )
  status, _, err = run(
    command.replace("n_max_step=40000", "n_max_step=40000 --command=validation"), place
  )
  assert status == 0 and "is damaged" not in err, err


@pytest.mark.parametrize(
  "name, count",
  [("enwik8", "187,679,750"), ("pg19", "1,314,659,584"), ("imagenet64", "1,249,622,276")],
)
def test_info_of_the_papers_settings(place, name, count):
  status, out, err = run(f"python -m experiments.{name} --command=info", place)
  assert status == 0 and f"Parameters:        {count}\n" in out and not err, err
  assert (
    "n_code            512" in out and "FLOPs per token" in out and "name the --data_dir" in out
  )


def test_info_counts_the_data(place):
  status, out, err = run(
    "python -m experiments.text --smoke --command=info --workdir=t --cache_dir=cache "
    "--config.grad_clip=none --config.agg_cache=false --config.lr_max=1e-3",
    place,
  )
  assert status == 0 and re.search(r"train +54,048 tokens +1 documents +54,047 bytes", out), err
  assert re.search(r"grad_clip +None\n", out) and re.search(r"agg_cache +False\n", out)
  assert re.search(r"lr_max +0.001\n", out)


def test_info_before_there_is_a_vocabulary(place):
  status, out, err = run(
    "python -m experiments.pg19 --smoke --command=info --workdir=fresh --config.n_max_step=30",
    place,
  )
  assert status == 0 and not err and re.search(r"validation +20,000 bytes\n", out), err
  assert "--command=train_vocab" in out and re.search(r"n_warmup_step +3\n", out)


BAD = [
  ("enwik8 --config.d_modell=3", 2, "Unknown command line flag 'config.d_modell'"),
  ("enwik8 --config.d_model=big", 2, "config.d_model=big"),
  ("enwik8 --config.agg_cache=perhaps", 2, "must be true or false"),
  ("enwik8 --command=fly", 2, "command"),
  ("enwik8 --smoke --config.block_len=0", 2, "block_len=0: must be at least 1"),
  ("enwik8", 1, "--data_dir is missing. Expected: the file enwik8, 100,000,000 bytes"),
  ("enwik8 --data_dir=nowhere", 1, "--data_dir=nowhere does not exist. Expected"),
  ("enwik8 --size=cpu --data_dir=README.md --workdir=new", 1, "README.md has"),
  ("enwik8 --smoke --data_dir=README.md", 2, "--smoke brings its own data"),
  ("enwik8 --smoke --workdir=README.md/run", 1, "cannot write to the directory"),
  ("enwik8 --command=train_vocab --data_dir=README.md", 2, "tokens are bytes"),
  ("imagenet64 --vocab=x.model --smoke", 2, "--vocab=x.model: the tokens of imagenet64 are bytes"),
  ("enwik8 --seed=18446744073709551616", 2, "seed"),
  (
    "enwik8 --command=test --workdir=nowhere --data_dir=README.md",
    1,
    "nowhere holds no checkpoint",
  ),
  (
    "pg19 --data_dir=experiments",
    1,
    "has no train or validation or test. Expected: the directories",
  ),
  ("pg19 --vocab=nowhere.model --smoke --workdir=v", 1, "there is no vocabulary nowhere.model"),
  ("pg19 --vocab=README.md --smoke --workdir=v", 1, "README.md is not a SentencePiece model"),
  ("pg19 --command=sample --workdir=nowhere", 1, "nowhere holds no checkpoint"),
  ("imagenet64 --data_dir=experiments", 1, "has no train_data_batch_*.npz. Expected"),
  (
    "imagenet64 --smoke --config.sequence_len=96 --workdir=v",
    1,
    "must be a multiple of the 192 tokens",
  ),
  ("text --data_dir=nowhere", 1, "--data_dir=nowhere does not exist. Expected: a text file"),
]


@pytest.mark.parametrize("command, status, message", BAD)
def test_bad_input_is_one_line_and_a_status(place, command, status, message):
  got, out, err = run(f"python -m experiments.{command} --cache_dir=cache", place)
  assert got == status, err
  assert message in err and len(err.strip().splitlines()) == 1, err
  assert not out and "Traceback" not in err and not (place / "new" / "checkpoints").exists()


def test_a_vocabulary_of_another_size(books, place):
  command = BOOKS.replace("=books", "=other") + " --vocab=books/vocab.model --config.n_vocab=500"
  status, out, err = run(command, place)
  assert status == 1 and not out, err
  assert "n_vocab=500, not the 512 of books/vocab.model" in err and len(err.splitlines()) == 1
  status, out, err = run(BOOKS + " --command=train_vocab", place)
  assert status == 1 and "books/vocab.model exists already" in err, err
