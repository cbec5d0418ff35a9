"""The files with sampled texts and images."""

import io

import jax
from PIL import Image
import pytest

from tvq_haiku.run import samples

import helpers
import privileges
import small_experiments
from small_experiments import CONFIG


def test_files_are_not_overwritten(tmp_path):
  for name in ("a.txt", "a-2.txt", "a-3.txt"):
    with samples.TextFile(tmp_path, "a.txt") as file:
      file.write(name)
    assert (tmp_path / "samples" / name).read_text() == name


def test_text_is_on_disk_before_the_file_is_closed(tmp_path):
  with samples.TextFile(tmp_path, "a.txt") as file:
    file.write("日本")
    assert file.path == tmp_path / "samples" / "a.txt"
    assert file.path.read_bytes() == "日本".encode()


def test_directory_that_cannot_be_written_is_a_warning_for_texts(tmp_path, capsys):
  tmp_path.chmod(0o555)
  try:
    with privileges.dropped(), samples.TextFile(tmp_path, "a.txt") as file:
      file.write("Anne")
      file.write("Elliot")
    with privileges.dropped(), pytest.raises(OSError, match="cannot write to the directory"):
      samples.new_file(tmp_path, "a.png")
  finally:
    tmp_path.chmod(0o755)
  assert file.path is None
  log = capsys.readouterr().err.splitlines()
  assert len(log) == 1 and "printed, but not saved: cannot write to the directory" in log[0]


def test_images_are_arranged_in_a_grid():
  size = small_experiments.IMAGE_SIZE
  params = helpers.random_params(CONFIG)
  content = samples.sample_images(params, CONFIG, 3, size=size, rng=jax.random.key(0), top_k=5)
  with Image.open(io.BytesIO(content)) as grid:
    assert grid.format == "PNG"
    assert grid.size == (2 * (size + 2) + 2, 2 * (size + 2) + 2)  # 2 x 2, with margins of 2
