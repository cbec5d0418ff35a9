"""Evaluation of files with the runs of all experiments."""

import io

import jax
import numpy as np
from PIL import Image
import pytest

from experiments import evaluation
from experiments.shared_flags import EvalFlags
import tvq_haiku as tvq

from small_experiments import IMAGE_SIZE

pytestmark = pytest.mark.slow

ONE_ROW = EvalFlags(eval_rows=1, eval_window=32, weights="last")


@pytest.mark.parametrize("kind", ["text", "books"])
def test_bits_per_byte_of_a_text_are_those_of_its_score(saved_runs, tmp_path, kind):
  text = "Anne Elliot, with all her claims of birth, naïve as ever."
  (tmp_path / "text.txt").write_text(text, encoding="utf-8")
  line = evaluation.evaluate_file(saved_runs[kind], str(tmp_path / "text.txt"), ONE_ROW)
  scores = saved_runs[kind].model.score([text])
  n_byte = len(text.encode())
  bits = -scores.logprobs[0] / np.log(2) / n_byte
  assert line.startswith(f"{bits:.4f} bits per byte over {n_byte} bytes (")


def test_images_are_read_as_pictures_or_bytes(saved_runs, tmp_path):
  """The images of a file are documents of their own."""
  model = saved_runs["images"].model
  pixels = np.random.default_rng(0).integers(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
  bits = [image_bits(model, image) for image in pixels]
  (tmp_path / "images").write_bytes(pixels.tobytes())
  Image.fromarray(pixels[1]).save(tmp_path / "second.png")
  for name, expected in (("images", np.mean(bits)), ("second.png", bits[1])):
    line = evaluation.evaluate_file(saved_runs["images"], str(tmp_path / name), ONE_ROW)
    assert float(line.split()[0]) == pytest.approx(expected, abs=2e-4)
    assert " bits per dimension over " in line


def image_bits(model, image):
  """Returns the bits per dimension of an image."""
  targets = image.reshape(-1).astype(np.int32) + 3
  inputs = np.append(1, targets[:-1])[None]
  apply = jax.jit(tvq.make_transformer(model.config).apply)
  out = apply(model.params, None, inputs, tvq.initial_state(model.config, 1))
  logprobs = np.asarray(jax.nn.log_softmax(out.logits[0]))
  return -logprobs[np.arange(len(targets)), targets].mean() / np.log(2)


def picture(size):
  """Returns the content of a PNG file."""
  content = io.BytesIO()
  Image.new("RGB", size).save(content, format="png")
  return content.getvalue()


@pytest.mark.parametrize(
  "kind, content, message",
  [
    ("text", b"", " is empty: there is nothing to evaluate"),
    ("images", b"1234", ": it must be a picture of 4 x 4 pixels, or the bytes of such images, 48 "),
    ("images", picture((4, 5)), ": it must be a picture of 4 x 4 pixels"),
  ],
)
def test_unsuitable_file_is_named(saved_runs, tmp_path, kind, content, message):
  (tmp_path / "file").write_bytes(content)
  with pytest.raises(ValueError, match=rf"--file={tmp_path}/file{message}"):
    evaluation.evaluate_file(saved_runs[kind], str(tmp_path / "file"), ONE_ROW)
