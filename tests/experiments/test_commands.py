"""The commands of the experiments on small data, as a user starts them."""

import json
import re
import shlex
import signal
import time

from PIL import Image
import pytest

import tvq_haiku as tvq

from launching import assert_fails_in_one_line, run, start, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow

# With one attention per layer, each process compiles in half the time; TEXT has the default heads.
BOOKS = "python -m experiments.pg19 --smoke --workdir=books --cache_dir=cache"
BOOKS += " --config.head_type=mqa"
IMAGES = "python -m experiments.imagenet64 --smoke --workdir=images --cache_dir=cache"
IMAGES += " --config.head_type=mqa"
TEXT = "python -m experiments.enwik8 --smoke --workdir=text --cache_dir=cache"


def read_records(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def has_checkpoint(workdir):
  directory = workdir / "checkpoints"
  return directory.exists() and any(path.name.isdigit() for path in directory.iterdir())


@pytest.fixture(scope="module")
def books(workspace):
  """Trains a book model that is killed once; returns output and messages of the second start."""
  command = (
    BOOKS + " --config.n_max_step=60 --config.n_warmup_step=5 --save_seconds=0 --log_every=4"
  )
  process = start(command, workspace)
  for line in process.stderr:
    if "training" in line and has_checkpoint(workspace / "books"):
      break
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  status, out, err = run(command, workspace)
  assert status == 0, err
  return out, err


def test_killed_run_resumes_and_logs_every_record_once(books, workspace):
  _, err = books
  first = int(re.search(r"training (\d+)/60", err)[1])
  assert first > 1 and f"after {first - 1} of 60 updates" in err
  assert "encoding" not in err and "vocabulary" not in err  # already done by the first start
  records = read_records(workspace / "books")
  assert [record["step"] for record in records if "loss_lm" in record] == list(range(4, 61, 4))


def test_training_prints_the_commands_that_test_and_sample(books, workspace):
  out, _ = books
  assert re.search(r"Best validation: perplexity [\d.e+]+ per word, after \d+ updates\.", out)
  commands = re.findall(r"^To .*?: +(python .*)$", out, re.M)
  assert [shlex.split(command)[-1] for command in commands] == [
    "--command=test",
    "--command=sample",
  ]
  status, out, err = run(commands[0], workspace)
  assert status == 0, err
  printed = re.search(
    r"test: word_perplexity [\d.e+]+, bits_per_byte (\d\.\d{4}), loss_lm (\d\.\d{4}) nats per "
    r"token; ([\d,]+) tokens \(20,000 bytes\)",
    out,
  )
  # Both metrics are the same total loss, divided by the number of bytes and of tokens.
  n_token = int(printed[3].replace(",", ""))
  nats = float(printed[2]) * n_token
  assert float(printed[1]) == pytest.approx(nats / 0.693147 / 20_000, abs=2e-4)
  flags = " --prompt='It was ' --length=20 --stream --top_k=40"
  status, out, err = run(commands[1] + flags, workspace)
  assert status == 0 and out.startswith("It was ") and "books/samples/step-" in err, err


def test_resuming_with_a_different_configuration_is_refused(books, workspace):
  command = BOOKS.removeprefix("python -m experiments.") + " --config.d_model=64"
  assert_fails_in_one_line(command, workspace, 1, "d_model is 32 in the run, 64 here")
  assert_fails_in_one_line(command, workspace, 1, "n_max_step is 60 in the run, 20 here")


def test_exported_parameters_initialize_a_new_run(books, workspace):
  status, out, err = run(BOOKS + " --command=export", workspace)
  assert status == 0, err
  exported = re.fullmatch(
    r"Wrote the parameters after (\d+) updates to books/params\.safetensors\n", out
  )
  best = tvq.load_checkpoint(workspace / "books" / "best")
  assert int(exported[1]) == int(best.train_state.step)
  command = BOOKS.replace("=books", "=initialized") + " --init=books/params.safetensors"
  command += " --log_every=1 --config.n_max_step=4 --config.n_warmup_step=0"
  status, _, err = run(command, workspace)
  assert status == 0 and "starting from books/params.safetensors: " in err, err
  from_random, from_exported = (read_records(workspace / name) for name in ("books", "initialized"))
  assert from_exported[0]["loss_lm"] < 0.9 * from_random[0]["loss_lm"]


@pytest.mark.parametrize(
  "flags, message",
  [
    (
      "--init=books/params.safetensors --config.d_model=64",
      "--init=books/params.safetensors: params",
    ),
    ("--init=books/vocab.model", "does not hold the parameters of a model"),
  ],
)
def test_unsuitable_initial_parameters_are_refused(books, workspace, flags, message):
  if not (workspace / "books" / "params.safetensors").exists():
    run(BOOKS + " --command=export", workspace)
  command = BOOKS.replace("=books", "=refused") + " --vocab=books/vocab.model " + flags
  assert_fails_in_one_line(command.removeprefix("python -m experiments."), workspace, 1, message)


def test_unsuitable_vocabulary_is_refused(books, workspace):
  command = BOOKS.replace("=books", "=refused").removeprefix("python -m experiments.")
  command += " --vocab=books/vocab.model --config.n_vocab=500"
  message = "n_vocab=500, not the 512 of books/vocab.model"
  assert_fails_in_one_line(command, workspace, 1, message)


def test_vocabulary_is_not_overwritten(books, workspace):
  before = (workspace / "books" / "vocab.model").read_bytes()
  command = BOOKS.removeprefix("python -m experiments.") + " --command=train_vocab"
  assert_fails_in_one_line(command, workspace, 1, "books/vocab.model exists already")
  assert (workspace / "books" / "vocab.model").read_bytes() == before


def test_trained_vocabulary_is_used_by_other_commands(workspace):
  text = "python -m experiments.text --smoke --workdir=words --cache_dir=cache"
  text += " --vocab=words.model --config.n_vocab=400"
  status, out, err = run(text + " --command=train_vocab", workspace)
  assert status == 0 and not out and "400 tokens: words.model" in err, err
  status, out, err = run(text + " --command=info", workspace)
  assert status == 0, err
  n_token = int(re.search(r"train +([\d,]+) tokens", out)[1].replace(",", ""))
  assert n_token < 54_048  # fewer tokens than bytes


def test_images_are_evaluated_and_sampled(workspace):
  status, out, err = run(IMAGES, workspace)
  assert status == 0 and "bits per dimension" in out, err
  flags = " --command=validation --weights=last --precision=bfloat16"
  status, out, err = run(IMAGES + flags, workspace)
  assert status == 0, err
  printed = re.search(r"validation: bits_per_dim (\d\.\d{4}), loss_lm (\d\.\d{4}) nats", out)
  assert float(printed[1]) > 0 and float(printed[2]) > 0
  file = workspace / "images" / "validation.figures.json"
  assert f"{json.loads(file.read_text())['bits_per_dim']:.4f}" == printed[1]
  status, out, err = run(IMAGES + " --command=sample --images=2", workspace)
  assert status == 0, err
  with Image.open(workspace / out.split()[-1]) as grid:
    assert grid.format == "PNG" and grid.size[0] >= 2 * 8 and grid.size[1] >= 8


def test_non_finite_loss_ends_the_run_and_names_the_first_tensor(workspace):
  command = TEXT.replace("=text", "=nan") + " --config.lr_max=1e30 --config.grad_clip=none"
  status, out, err = run(command + " --config.n_warmup_step=0 --debug_nans", workspace)
  assert status == 1 and not out and "Traceback" not in err, err
  assert "loss" in err and err.splitlines()[-1].startswith("enwik8: ")
  assert "the first" in err.splitlines()[-1]


def test_interrupt_before_the_first_update_leaves_a_run_that_can_be_started(workspace):
  command = TEXT.replace("=text", "=early") + " --config.n_layer=4"
  process = start(command, workspace)
  while "encoding" not in process.stderr.readline():
    assert process.poll() is None
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  if process.returncode == 130:  # interrupted before the training loop handled signals
    assert err.splitlines()[-1] == "enwik8: interrupted."
  else:
    assert process.returncode == 0 and "Stopped after" in out, err
  status, out, err = run(command, workspace)
  assert status == 0 and "Trained for 20 updates." in out, err


def test_terminated_run_names_the_command_that_resumes_it(workspace):
  command = TEXT + " --config.n_max_step=2000"
  process = start(command, workspace)
  while "training" not in process.stderr.readline():
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  resume = re.search(r"Stopped after (\d+) of 2000 updates and saved\. To resume: (.*)\n", out)
  assert resume[2] == command
  assert (workspace / "text" / "checkpoints" / resume[1]).is_dir()


def test_second_interrupt_ends_the_run_at_once_and_keeps_its_checkpoints(workspace):
  command = TEXT.replace("=text", "=twice") + " --config.n_max_step=40000 --save_seconds=0"
  process = start(command, workspace)
  while not has_checkpoint(workspace / "twice"):
    assert process.poll() is None
    time.sleep(0.01)
  while process.poll() is None:  # the first signal asks the run to stop, the second ends it
    process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 128 + signal.SIGINT and "Stopped" not in out, err
  assert err.splitlines()[-1].startswith("finishing this batch and saving; a second Ctrl-C"), err
  status, out, err = run(command + " --command=validation", workspace)
  assert status == 0 and "damaged" not in err and "validation: bits_per_byte" in out, err
