"""Sampling from a checkpoint, as a user starts it."""

import signal
import subprocess

import jax
from PIL import Image
import pytest

import tvq_haiku as tvq

import helpers
from launching import assert_fails_in_one_line, run, start, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow

SAMPLE = "python -m experiments.sample --workdir=runs/quickstart"
# At temperature 0, the text does not end: an end-of-document token is never the most likely one.
ENDLESS = SAMPLE + " --temperature=0 --length=1000000"


def test_text_is_printed_and_saved(quickstart, workspace):
  flags = " --prompt='Anne ' --prompt=Bath --length=40 --top_k=50 --min_p=0.01 --stop=qqq"
  status, out, err = run(SAMPLE + " --stream" + flags, workspace)
  assert (status, err) == (0, "written to runs/quickstart/samples/step-20-seed-0.txt\n"), err
  assert out.startswith("Anne ") and "\n\nBath" in out


def test_stream_ends_silently_when_its_reader_closes_it(quickstart, workspace):
  process = start(ENDLESS + " --stream", workspace)
  process.stdout.read(1)
  process.stdout.close()
  assert process.wait(timeout=120) == 128 + signal.SIGPIPE
  with process.stderr as errors:
    assert not errors.read()


def test_conversation_continues_after_an_interrupted_reply(quickstart, workspace):
  process = start(ENDLESS + " --interactive", workspace, stdin=subprocess.PIPE)
  for prompt in ("Anne said", "Bath"):
    process.stdin.write(prompt + "\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # the reply has started
    process.send_signal(signal.SIGINT)
    process.stdout.readline()  # the reply has ended
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0 and not out, out + err
  assert err.startswith("written to runs/quickstart/samples/step-20-seed-0"), err


def test_interrupted_stream_is_reported_in_one_line(quickstart, workspace):
  process = start(ENDLESS + " --stream", workspace)
  process.stdout.read(1)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 130 and err == "sample: interrupted.\n"


def test_images_are_written_as_a_grid(quickstart, workspace):
  status, out, err = run(SAMPLE + " --png=grids/grid.png --images=3 --image_size=4", workspace)
  assert status == 0 and "3 images of 4 x 4 pixels" in out, err
  with Image.open(workspace / "grids" / "grid.png") as grid:
    assert grid.size == (2 * 6 + 2, 2 * 6 + 2)


@pytest.mark.parametrize(
  "command", ["sample", "evaluate --file=README.md", "compress README.md --output=x"]
)
def test_checkpoint_with_a_different_vocabulary_is_refused(workspace, command):
  if not (workspace / "other").exists():
    config, train_cfg = helpers.tiny(n_layer=1), tvq.TrainConfig()
    state = tvq.init_train_state(config, train_cfg, jax.random.key(0))
    checkpoint = tvq.Checkpoint(config, train_cfg, state, jax.random.key(0), 0)
    tvq.save_checkpoint(workspace / "other", checkpoint)
  message = "n_vocab=11, not the 259"
  assert_fails_in_one_line(f"{command} --workdir=other", workspace, 1, message)
  assert not (workspace / "x").exists()


@pytest.mark.parametrize(
  "command, status, message",
  [
    ("sample", 2, "sample: --workdir is missing"),
    ("sample --workdir=nowhere", 1, "nowhere holds no checkpoint: it does not exist"),
    ("sample --workdir=nowhere --top_p=1.5", 2, "top_p"),
    ("sample --workdir=runs/quickstart --length=0", 2, "length"),
    ("sample --workdir=runs/quickstart --top_p=0", 2, "top_p"),
    ("sample --workdir=runs/quickstart --stream --interactive", 2, "exclude each other"),
    ("sample --checkpoint=runs/quickstart --png=x.png", 2, "if it is, set --image_size"),
  ],
)
def test_wrong_input_is_reported_in_one_line(quickstart, workspace, command, status, message):
  assert_fails_in_one_line(command, workspace, status, message)
  assert not (workspace / "x.png").exists()
