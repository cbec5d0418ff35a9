"""Functions that all datasets share: lines, paths and fingerprints."""

import os

import pytest

from tvq_haiku.data.sources import base


def chunks(*contents):
  for content in contents:
    yield base.Chunk(content, is_last=True, file="a.txt")


@pytest.mark.parametrize(
  "n_byte, lines",
  [
    (100, ["Anne", "Elliot", "Bath"]),
    (12, ["Anne", "Elliot"]),
    (8, ["Anne", "El"]),
    (14, ["Anne", "Elliot", "Ba"]),
  ],
)
def test_lines_stop_after_n_bytes(n_byte, lines):
  assert list(base.lines(chunks(b"Anne\n\nElliot", b"Bath\n"), n_byte)) == lines


def test_lines_read_no_more_chunks_than_needed():
  remaining = chunks(b"Anne\n", b"Bath\n", b"Emma\n")
  assert list(base.lines(remaining, 7)) == ["Anne", "Ba"]
  assert next(remaining).content == b"Emma\n"


def test_existing_path_names_what_is_expected(tmp_path):
  assert base.existing_path(str(tmp_path), "Expected: a file.") == tmp_path
  with pytest.raises(ValueError, match=r"^--data_dir is missing\. Expected: a file\.$"):
    base.existing_path(None, "Expected: a file.")
  with pytest.raises(ValueError, match=r"nowhere does not exist\. Expected: a file\.$"):
    base.existing_path(tmp_path / "nowhere", "Expected: a file.")


def test_fingerprint_changes_with_size_and_modification_time(tmp_path):
  file = tmp_path / "a.txt"
  file.write_bytes(b"Anne")
  os.utime(file, ns=(0, 7_000))
  assert base.fingerprint([file]) == [["a.txt", 4, 7_000]]
  os.utime(file, ns=(0, 8_000))
  assert base.fingerprint([file]) == [["a.txt", 4, 8_000]]
  assert base.describe_ranges([base.FileRange(file, 1, 3)]) == [[[1, 3]], [["a.txt", 4, 8_000]]]
