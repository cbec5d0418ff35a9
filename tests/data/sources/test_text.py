"""enwik8 and text files: every byte is in one split, and errors name the file and the problem."""

import bz2
import gzip
import lzma
import zipfile

import pytest

from tvq_haiku import data
from tvq_haiku.data.sources import base
from tvq_haiku.data.sources import text as text_sources

from data_helpers import read_documents

TEXT = bytes(range(256)) * 4 + b"an end"


def write_zip(path, members):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in members.items():
      archive.writestr(name, content)


class TestEnwik8:
  @pytest.mark.parametrize(
    "name, write",
    [
      ("enwik8", lambda path: path.write_bytes(TEXT)),
      ("enwik8.zip", lambda path: write_zip(path, {"enwik8": TEXT})),
      ("enwik8.gz", lambda path: path.write_bytes(gzip.compress(TEXT))),
      ("enwik8.bz2", lambda path: path.write_bytes(bz2.compress(TEXT))),
      ("enwik8.xz", lambda path: path.write_bytes(lzma.compress(TEXT))),
    ],
  )
  def test_reads_plain_and_compressed_files_by_directory_or_name(self, tmp_path, name, write):
    write(tmp_path / name)
    for path in (tmp_path, tmp_path / name):
      source = data.Enwik8(path, n_byte=len(TEXT))
      splits = [read_documents(source, split) for split in base.SPLITS]
      assert [len(documents) for documents in splits] == [1, 1, 1]
      assert b"".join(documents[0] for documents in splits) == TEXT
      assert len(splits[0][0]) == len(TEXT) * 90 // 100 and not source.has_eos

  def test_a_split_is_one_document_of_several_chunks(self, tmp_path, monkeypatch):
    (tmp_path / "enwik8").write_bytes(TEXT)
    monkeypatch.setattr(text_sources, "_CHUNK", 100)
    source = data.Enwik8(tmp_path, n_byte=len(TEXT))
    assert len(list(source.read("train"))) == 10
    assert read_documents(source, "train") == [TEXT[:927]]

  def test_the_published_size_has_the_usual_splits(self, tmp_path):
    (tmp_path / "enwik8").write_bytes(b"")
    source = data.Enwik8(tmp_path)
    assert [source.n_byte(s) for s in base.SPLITS] == [90_000_000, 5_000_000, 5_000_000]

  @pytest.mark.parametrize(
    "name, content, message",
    [
      ("enwik8", TEXT[:-1], "has 1,029 bytes, not 1,030: it is truncated"),
      ("enwik8", TEXT + b".", "has more than 1,030 bytes, not 1,030"),
      ("enwik8.gz", gzip.compress(TEXT)[:-20], "truncated or damaged"),
      ("enwik8.gz", TEXT, "truncated or damaged"),
      ("enwik8.bz2", b"not an archive", "truncated or damaged: Invalid data stream"),
      ("enwik8.bz2", bz2.compress(TEXT)[:-9], "truncated or damaged|has .* bytes, not 1,030"),
      ("enwik8.xz", lzma.compress(TEXT)[:-30], "truncated or damaged|has .* bytes, not 1,030"),
      ("enwik8.zip", TEXT, "truncated or damaged"),
      ("enwik9", TEXT, "contains no enwik8. Expected: the file enwik8, 1,030 bytes"),
    ],
  )
  def test_a_bad_file_is_named_with_its_problem(self, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
      list(data.Enwik8(tmp_path, n_byte=len(TEXT)).read("train"))
    assert str(tmp_path) in str(caught.value)

  def test_a_zip_without_a_member_enwik8(self, tmp_path):
    write_zip(tmp_path / "enwik8.zip", {"readme.txt": b"no"})
    with pytest.raises(ValueError, match=r"has no member enwik8, but \['readme.txt'\]"):
      list(data.Enwik8(tmp_path).read("train"))

  def test_a_damaged_zip(self, tmp_path):
    write_zip(tmp_path / "enwik8.zip", {"enwik8": TEXT})
    content = bytearray((tmp_path / "enwik8.zip").read_bytes())
    content[60] ^= 0xFF
    (tmp_path / "enwik8.zip").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
      list(data.Enwik8(tmp_path, n_byte=len(TEXT)).read("test"))

  def test_a_missing_file(self, tmp_path):
    for path, message in (
      (tmp_path / "nowhere", "nowhere does not exist. Expected"),
      (None, "--data_dir is missing. Expected: the file enwik8, 100,000,000 bytes"),
    ):
      with pytest.raises(ValueError, match=message):
        data.Enwik8(path)

  def test_a_file_that_is_too_small_for_three_splits(self, tmp_path):
    (tmp_path / "enwik8").write_bytes(b"123456789")
    with pytest.raises(ValueError, match="9 bytes leave none for the split 'validation'"):
      list(data.Enwik8(tmp_path, n_byte=9).read("validation"))


class TestTextFiles:
  def write(self, root, texts):
    for name, text in texts.items():
      (root / name).parent.mkdir(parents=True, exist_ok=True)
      (root / name).write_bytes(text)
    return data.TextFiles(root)

  @pytest.mark.parametrize("chunk", [1 << 24, 7])
  @pytest.mark.parametrize(
    "texts",
    [
      {"a.txt": b"line\n" * 100, "b/c.txt": b"x" * 37 + b"\n" + "ü\n".encode() * 200, "d": b"z"},
      {"one": b"." + "é".encode() * 500},
      {"a": "é🧀".encode() * 100 + b"\n", "b": "ü".encode() * 99},
    ],
  )
  def test_splits_contain_every_byte_once_and_divide_no_character(
    self, tmp_path, monkeypatch, texts, chunk
  ):
    source = self.write(tmp_path, texts)
    monkeypatch.setattr(text_sources, "_CHUNK", chunk)
    splits = [read_documents(source, split) for split in base.SPLITS]
    assert b"".join(b"".join(documents) for documents in splits) == b"".join(texts.values())
    for documents in splits:
      assert documents
      for document in documents:
        document.decode()
    assert source.has_eos

  def test_a_single_file_is_divided_between_lines(self, tmp_path):
    (tmp_path / "one.txt").write_bytes(b"a line\n" * 200)
    source = data.TextFiles(tmp_path / "one.txt")
    documents = [read_documents(source, split) for split in base.SPLITS]
    assert documents == [[b"a line\n" * n] for n in (180, 10, 10)]

  def test_chunks_divide_no_character(self, tmp_path, monkeypatch):
    source = self.write(tmp_path, {"one": "é🧀".encode() * 500})
    monkeypatch.setattr(text_sources, "_CHUNK", 64)
    chunks = [chunk.content.decode() for chunk in source.read("train")]
    assert len(chunks) > 20 and "".join(chunks) == "é🧀" * 450

  def test_hidden_files_are_ignored(self, tmp_path):
    source = self.write(
      tmp_path, {"a": b"text\n" * 50, ".git/objects/ab": b"binary", ".b": b"hidden"}
    )
    documents = [read_documents(source, split) for split in base.SPLITS]
    assert documents == [[b"text\n" * 45], [b"text\n" * 3], [b"text\n" * 2]]

  def test_links_are_followed(self, tmp_path):
    self.write(tmp_path / "elsewhere", {f"{split}/1.txt": split.encode() for split in base.SPLITS})
    (tmp_path / "linked").symlink_to("elsewhere")
    (tmp_path / "links").mkdir()
    for split in base.SPLITS:
      (tmp_path / "links" / split).symlink_to(f"../elsewhere/{split}")
    for name in ("linked", "links"):
      source = data.TextFiles(tmp_path / name)
      for split in base.SPLITS:
        assert read_documents(source, split) == [split.encode()]

  def test_directories_named_like_splits_are_the_splits(self, tmp_path):
    source = self.write(tmp_path, {f"{split}/1.txt": split.encode() for split in base.SPLITS})
    for split in base.SPLITS:
      assert read_documents(source, split) == [split.encode()]

  def test_sample_reads_the_training_split_in_a_seeded_order(self, tmp_path):
    source = self.write(tmp_path, {f"{i}.txt": f"text {i}\n\n".encode() * 10 for i in range(10)})
    lines = list(source.sample(500, seed=1))
    assert 490 < sum(len(line) + 2 for line in lines) <= 502
    assert set(lines[:-1]) <= {f"text {i}" for i in range(9)}  # the last line may be incomplete
    assert lines != list(source.sample(500, seed=2)) and lines == list(source.sample(500, seed=1))

  def test_no_text(self, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"contains no text\. Expected: a text file"):
      data.TextFiles(tmp_path)

  def test_a_file_that_is_truncated_while_it_is_read(self, tmp_path, monkeypatch):
    source = self.write(tmp_path, {"a.txt": b"line\n" * 400_000})  # more than a file's buffer
    monkeypatch.setattr(text_sources, "_CHUNK", 5000)
    chunks = source.read("train")
    next(chunks)
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.txt became shorter while it was read"):
      list(chunks)
