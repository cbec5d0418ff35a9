"""The commands that compress and evaluate files, as a user starts them."""

import pytest

from launching import assert_fails_in_one_line, run, workspace

assert workspace  # a fixture

pytestmark = pytest.mark.slow


def test_decompression_restores_the_file_and_evaluation_agrees_on_its_size(quickstart, workspace):
  text = (workspace / "README.md").read_bytes()[:2000]
  (workspace / "short.txt").write_bytes(text)
  compress = "python -m experiments.compress --workdir=runs/quickstart"
  status, out, err = run(f"{compress} short.txt", workspace)
  assert status == 0, err
  compressed = (workspace / "short.txt.tvqz").read_bytes()
  bits_per_byte = 8 * len(compressed) / len(text)
  assert out.endswith(f"{len(compressed):,} bytes, from 2,000, {bits_per_byte:.4f} bits per byte\n")
  (workspace / "short.txt").unlink()
  status, out, err = run(f"{compress} --decompress short.txt.tvqz", workspace)
  assert status == 0 and (workspace / "short.txt").read_bytes() == text, err
  evaluate = "python -m experiments.evaluate --workdir=runs/quickstart --file=short.txt --rows=1"
  status, out, err = run(evaluate, workspace)
  assert status == 0, err
  # An arithmetic coder needs a few bytes more than the likelihood of the text, and a header.
  assert 0.0 <= bits_per_byte - float(out.split()[0]) < 8 * 40 / len(text)


@pytest.mark.parametrize(
  "command, status, message",
  [
    ("compress --workdir=runs/quickstart", 2, "FILE is missing"),
    ("compress --workdir=runs/quickstart empty.txt twice", 2, "unexpected argument 'twice'"),
    (
      "compress --workdir=runs/quickstart empty.txt --output=README.md",
      1,
      "README.md exists already",
    ),
    ("compress --workdir=runs/quickstart --decompress README.md", 1, "with --output"),
    (
      "compress --workdir=runs/quickstart --decompress README.md --output=x",
      1,
      "README.md: this is not compressed data",
    ),
    (
      "evaluate --workdir=runs/quickstart --file=missing.txt",
      1,
      "--file=missing.txt cannot be read: No such file",
    ),
    ("compress --workdir=runs/quickstart missing.txt", 1, "missing.txt cannot be read: No such"),
    ("evaluate --workdir=runs/quickstart --file=empty.txt", 1, "empty.txt is empty"),
  ],
)
def test_wrong_input_is_reported_in_one_line(quickstart, workspace, command, status, message):
  (workspace / "empty.txt").write_text("")
  assert_fails_in_one_line(command, workspace, status, message)
  assert not (workspace / "x").exists()
