"""Functions that all datasets share: lines, paths and fingerprints."""

import os

import pytest

from tvq_haiku.data.sources import base

import privileges


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


class TestFilesBelow:
  """Links in data directories."""

  @pytest.fixture
  def root(self, tmp_path):
    """A directory with a file, a hidden file and a link to another directory."""
    root, other = tmp_path / "root", tmp_path / "other"
    for file in (root / "b.txt", root / ".hidden", root / "c" / "d.txt", other / "e.txt"):
      file.parent.mkdir(exist_ok=True, parents=True)
      file.write_bytes(b"Anne")
    (root / "a").symlink_to("../other")
    (root / ".broken").symlink_to("nowhere")
    return root

  def test_links_are_followed(self, root):
    (root.parent / "link").symlink_to("root")
    (root.parent / "links").mkdir()
    (root.parent / "links" / "to-root").symlink_to("../root")
    for name in ("root", "link", "links/to-root", "links"):
      names = [
        path.relative_to(root.parent / name) for path in base.files_below(root.parent / name)
      ]
      prefix = "to-root/" if name == "links" else ""
      assert list(map(str, names)) == [prefix + x for x in ("a/e.txt", "b.txt", "c/d.txt")]

  @pytest.mark.parametrize("target", ["root", "root/c", ".", "/"])
  def test_loops_are_refused(self, root, target):
    """The link is reached through another link, from each of the directories it leads to."""
    loop = root.parent / "other" / "loop"
    loop.symlink_to(root.parent / target if target != "/" else "/")
    (root / "c" / "back").symlink_to("../../other")
    with pytest.raises(ValueError, match=r"is a link to /.*, which contains it: remove the link"):
      base.files_below(root)

  @pytest.mark.parametrize("target", ["nowhere", "broken"])
  def test_broken_links_are_refused(self, root, target):
    (root / "c" / "broken").symlink_to(target)
    with pytest.raises(ValueError, match=rf"c/broken is a broken link \(to {target}\): restore"):
      base.files_below(root)
    with pytest.raises(ValueError, match=r"c/broken is a broken link"):
      base.find_files(root / "c", "*oken")
    assert base.find_files(root / "c", "*.txt") == [root / "c" / "d.txt"]

  def test_unreadable_directories_are_refused(self, root):
    (root / "c").chmod(0)
    try:
      with privileges.dropped(), pytest.raises(PermissionError, match="root/c"):
        base.files_below(root)
    finally:
      (root / "c").chmod(0o755)


def test_fingerprint_changes_with_size_and_modification_time(tmp_path):
  file = tmp_path / "a.txt"
  file.write_bytes(b"Anne")
  os.utime(file, ns=(0, 7_000))
  assert base.fingerprint([file]) == [["a.txt", 4, 7_000]]
  os.utime(file, ns=(0, 8_000))
  assert base.fingerprint([file]) == [["a.txt", 4, 8_000]]
  assert base.describe_ranges([base.FileRange(file, 1, 3)]) == [[[1, 3]], [["a.txt", 4, 8_000]]]


@pytest.mark.parametrize(
  "path, name",
  [
    ("日本.txt", "日本"),
    ("a.tar.gz", "a.tar"),
    (".hidden/", "hidden"),
    ("...", "data"),
    ("a" * 59 + " b", "a" * 59),
  ],
)
def test_names_of_data_fit_into_file_names(path, name):
  assert base.data_name(path) == name
