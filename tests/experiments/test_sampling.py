"""Sampling from the runs of all experiments."""

import io
import sys

from absl import flags
from PIL import Image
import pytest

from experiments import console, sampling, shared_flags

from small_experiments import IMAGE_SIZE

pytestmark = pytest.mark.slow


@pytest.fixture
def sample(saved_runs, tmp_path, capsys):
  """Returns a function that samples from a run; it returns the output and the new file."""

  def run_command(kind, *arguments, **record):
    values = flags.FlagValues()
    shared_flags.define_sampling_flags(values)
    values(["sample", *arguments])
    run = saved_runs[kind]
    run = run._replace(directory=tmp_path, record=run.record._replace(**record))
    options = shared_flags.read_group(shared_flags.SampleFlags, values)
    sampling.sample(run, options, seed=0)
    files = sorted((tmp_path / "samples").glob("*"), key=lambda file: file.stat().st_mtime_ns)
    return capsys.readouterr().out, files[-1] if files else None

  return run_command


@pytest.mark.parametrize("kind", ["text", "books"])
def test_streamed_text_equals_text_sampled_at_once_and_is_saved(sample, kind):
  arguments = ("--prompt=Anne ", "--prompt=Bath", "--length=24", "--top_k=50", "--min_p=0.001")
  arguments += ("--stop=qqq", "--temperature=0.9")
  at_once, first = sample(kind, *arguments)
  streamed, second = sample(kind, *arguments, "--stream")
  assert at_once == streamed and first != second
  assert at_once.startswith("Anne ") and "\n\nBath" in at_once
  assert (first.name, second.name) == ("step-8-seed-0.txt", "step-8-seed-0-2.txt")
  saved = first.read_text(encoding="utf-8")
  assert saved == second.read_text(encoding="utf-8")
  assert saved.replace("--- 0 ---\n", "").replace("--- 1 ---\n", "") == at_once


def test_replies_of_a_conversation_are_printed_and_saved(sample, monkeypatch):
  def answer(text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    return sample("books", "--interactive", "--length=12")

  out, file = answer("Anne said\nBath\n")
  first, _ = sample("books", "--prompt=Anne said", "--length=12")
  assert out.startswith(first.removeprefix("Anne said").rstrip("\n"))
  text = file.read_text(encoding="utf-8")
  assert text.startswith("> Anne said\n") and "> Bath\n" in text
  assert text.replace("> Anne said\n", "").replace("> Bath\n", "") == out


@pytest.mark.parametrize("mode", [(), ("--stream",)])
def test_saved_text_has_the_characters_that_cannot_be_printed(sample, monkeypatch, mode):
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
  console.replace_unprintable("sample")
  _, file = sample("text", "--prompt=日本 ", "--length=5", *mode)
  assert file.read_text(encoding="utf-8").startswith("日本 ")
  assert sys.stdout.buffer.getvalue().startswith(b"?? ")


def test_prompt_of_bytes_need_not_be_utf8(sample):
  out, _ = sample("text", b"--prompt=\xff".decode(errors="surrogateescape"), "--length=3")
  assert out.startswith("\N{REPLACEMENT CHARACTER}")


def test_top_p_is_that_of_the_experiment_unless_a_flag_sets_it(sample):
  greedy, _ = sample("text", "--length=20", "--temperature=0")
  assert sample("text", "--length=20", top_p=1e-9)[0] == greedy
  assert sample("text", "--length=20", "--top_p=1", top_p=1e-9)[0] != greedy


def test_model_of_images_is_known_from_its_run(sample, tmp_path):
  out, file = sample("images", "--images=3")
  assert out == f"3 images of 4 x 4 pixels: {file}\n" and file.name == "step-8-seed-0.png"
  out, _ = sample("images", "--images=1", f"--png={tmp_path}/new/one.png")
  for path, columns in ((file, 2), (tmp_path / "new" / "one.png", 1)):
    with Image.open(path) as grid:
      assert grid.format == "PNG" and grid.size[0] == columns * (IMAGE_SIZE + 2) + 2


def test_run_without_a_record_samples_images_of_a_given_size(sample, tmp_path):
  sample("text", "--image_size=2", "--images=1", f"--png={tmp_path}/a.png")
  with Image.open(tmp_path / "a.png") as grid:
    assert grid.size == (6, 6)


@pytest.mark.parametrize(
  "kind, arguments, message",
  [
    ("text", ["--stream", "--interactive"], "--stream and --interactive exclude each other"),
    ("text", ["--png=a.png"], "--png=a.png: .* if it is, set --image_size"),
    ("images", ["--prompt=Anne"], "--prompt is for models of text, but .* one of images"),
    ("images", ["--stop=."], "--stop is for models of text"),
    ("images", ["--stream"], "--stream is for models of text"),
    ("images", ["--interactive"], "--interactive is for models of text"),
  ],
)
def test_contradicting_flags_are_refused(sample, tmp_path, kind, arguments, message):
  with pytest.raises(flags.ValidationError, match=message):
    sample(kind, *arguments)
  assert not list(tmp_path.iterdir())
