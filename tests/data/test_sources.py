"""Data sets as users have them: every byte, once, in its split; and what is wrong with a file."""

import bz2
import gzip
import lzma
import pathlib
import zipfile

import numpy as np
import pytest

from tvq_haiku import data
from tvq_haiku.data import toy_datasets
from tvq_haiku.data.sources import base
from tvq_haiku.data.sources import text as text_sources

TEXT = bytes(range(256)) * 4 + b"an end"


def contents(source, split):
  """The documents of a split."""
  documents, whole = [], b""
  for piece in source.read(split):
    whole += piece.content
    if piece.ends:
      documents, whole = [*documents, whole], b""
  assert not whole
  assert source.n_byte(split) == sum(map(len, documents))
  return documents


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
  def test_raw_or_packed_in_a_directory_or_by_name(self, tmp_path, name, write):
    write(tmp_path / name)
    for place in (tmp_path, tmp_path / name):
      source = data.Enwik8(place, n_byte=len(TEXT))
      parts = [contents(source, split) for split in base.SPLITS]
      assert [len(part) for part in parts] == [1, 1, 1]
      assert b"".join(part[0] for part in parts) == TEXT
      assert len(parts[0][0]) == len(TEXT) * 90 // 100 and not source.has_eos

  def test_the_published_size_is_split_as_usual(self, tmp_path):
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
      ("enwik8.bz2", b"no archive at all", "truncated or damaged: Invalid data stream"),
      ("enwik8.bz2", bz2.compress(TEXT)[:-9], "truncated or damaged|has .* bytes, not 1,030"),
      ("enwik8.xz", lzma.compress(TEXT)[:-30], "truncated or damaged|has .* bytes, not 1,030"),
      ("enwik8.zip", TEXT, "truncated or damaged"),
      ("enwik9", TEXT, "holds no enwik8. Expected: the file enwik8, 1,030 bytes"),
    ],
  )
  def test_what_is_wrong_is_said(self, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
      list(data.Enwik8(tmp_path, n_byte=len(TEXT)).read("train"))
    assert str(tmp_path) in str(caught.value)

  def test_a_zip_without_it(self, tmp_path):
    write_zip(tmp_path / "enwik8.zip", {"readme.txt": b"no"})
    with pytest.raises(ValueError, match=r"holds no member enwik8; it has \['readme.txt'\]"):
      list(data.Enwik8(tmp_path).read("train"))

  def test_a_damaged_zip(self, tmp_path):
    write_zip(tmp_path / "enwik8.zip", {"enwik8": TEXT})
    content = bytearray((tmp_path / "enwik8.zip").read_bytes())
    content[60] ^= 0xFF
    (tmp_path / "enwik8.zip").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
      list(data.Enwik8(tmp_path, n_byte=len(TEXT)).read("test"))

  def test_missing(self, tmp_path):
    for place, message in (
      (tmp_path / "nowhere", "nowhere does not exist. Expected"),
      (None, "--data_dir is missing. Expected: the file enwik8, 100,000,000 bytes"),
    ):
      with pytest.raises(ValueError, match=message):
        data.Enwik8(place)


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
  def test_every_byte_once_and_no_character_cut(self, tmp_path, monkeypatch, texts, chunk):
    source = self.write(tmp_path, texts)
    monkeypatch.setattr(text_sources, "_CHUNK", chunk)
    parts = {split: contents(source, split) for split in base.SPLITS}
    assert b"".join(b"".join(documents) for documents in parts.values()) == b"".join(texts.values())
    for documents in parts.values():
      assert documents
      for document in documents:
        document.decode()
    assert source.has_eos

  def test_one_file_alone(self, tmp_path):
    (tmp_path / "one.txt").write_bytes(b"line\n" * 200)
    source = data.TextFiles(tmp_path / "one.txt")
    assert [len(contents(source, split)[0]) for split in base.SPLITS] == [900, 50, 50]

  def test_no_piece_cuts_a_character(self, tmp_path, monkeypatch):
    source = self.write(tmp_path, {"one": "é🧀".encode() * 500})
    monkeypatch.setattr(text_sources, "_CHUNK", 64)
    pieces = [piece.content.decode() for piece in source.read("train")]
    assert len(pieces) > 20 and "".join(pieces) == ("é🧀" * 500)[: len("".join(pieces))]

  def test_hidden_files_are_left_out(self, tmp_path):
    source = self.write(
      tmp_path, {"a": b"text\n" * 50, ".git/objects/ab": b"binary", ".b": b"hidden"}
    )
    assert contents(source, "train") + contents(source, "validation") + contents(
      source, "test"
    ) == [b"text\n" * 45, b"text\n" * 3, b"text\n" * 2]

  def test_splits_that_are_there(self, tmp_path):
    source = self.write(tmp_path, {f"{split}/1.txt": split.encode() for split in base.SPLITS})
    for split in base.SPLITS:
      assert contents(source, split) == [split.encode()]

  def test_sample_is_of_the_training_split(self, tmp_path):
    source = self.write(tmp_path, {f"{i}.txt": f"text {i}\n\n".encode() * 10 for i in range(10)})
    lines = list(source.sample(500, seed=1))
    assert 490 < sum(len(line) + 2 for line in lines) <= 502
    assert set(lines[:-1]) <= {f"text {i}" for i in range(9)}  # the last one may be cut
    assert lines != list(source.sample(500, seed=2)) and lines == list(source.sample(500, seed=1))

  def test_no_text(self, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
      data.TextFiles(tmp_path)


class TestBooks:
  def test_a_book_is_a_document(self, tmp_path):
    source = data.Books(toy_datasets.write_books(tmp_path, n_byte=500))
    novels = [text for _, text in sorted(data.austen().items())]
    assert contents(source, "train") == [text[:500] for text in novels[:4]]
    assert contents(source, "test") == [novels[5][:500]]
    assert source.missing() == []

  def test_missing_books_are_named(self, tmp_path):
    toy_datasets.write_books(tmp_path, n_byte=100)
    (tmp_path / "train" / "2.txt").unlink()
    assert data.Books(tmp_path).missing() == ["2"]
    (tmp_path / "metadata.csv").unlink()
    assert data.Books(tmp_path).missing() == []

  def test_a_book_that_is_not_utf8(self, tmp_path):
    toy_datasets.write_books(tmp_path, n_byte=100)
    (tmp_path / "validation" / "5.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"validation/5\.txt is not UTF-8: .* at byte 3"):
      contents(data.Books(tmp_path), "validation")

  def test_empty_and_missing_splits(self, tmp_path):
    with pytest.raises(ValueError, match="has no train or validation or test"):
      data.Books(tmp_path)
    toy_datasets.write_books(tmp_path, n_byte=100)
    for file in (tmp_path / "test").iterdir():
      file.unlink()
    with pytest.raises(ValueError, match="the split 'test' is empty"):
      data.Books(tmp_path)


class TestDownsampledImages:
  def write(self, root, name, images, **more):
    np.savez(pathlib.Path(root) / name, data=images, **more)

  def make(self, root, n=(5, 4, 3), size=2):
    """Archives of n images; pixel values say which image, channel, row and column they are of."""
    index, count = 0, []
    for i, name in zip(n, ("train_data_batch_1", "train_data_batch_2", "val_data")):
      images = (np.arange(i)[:, None, None, None] + index) * 16 + np.arange(12).reshape(3, 2, 2)
      self.write(root, name, images.reshape(i, -1).astype(np.uint8), labels=np.zeros(i))
      index += i
      count.append(i)
    return root

  @pytest.mark.parametrize("n_train", [3, 5, 7])
  def test_pixels_row_by_row_channels_side_by_side(self, tmp_path, n_train):
    source = data.DownsampledImages(self.make(tmp_path), n_train=n_train, size=2)
    expected = {"train": range(n_train), "validation": range(n_train, 9), "test": range(9, 12)}
    for split, numbers in expected.items():
      documents = contents(source, split)
      want = [
        bytes(
          16 * i + plane * 4 + row * 2 + column
          for row in range(2)
          for column in range(2)
          for plane in range(3)
        )
        for i in numbers
      ]
      assert documents == want
    assert not source.has_eos and source.document_len == 12

  def test_archives_in_the_order_of_their_numbers(self, tmp_path):
    for number in (10, 9, 1):
      self.write(tmp_path, f"train_data_batch_{number}", np.full((1, 12), number, np.uint8))
    self.write(tmp_path, "val_data", np.zeros((1, 12), np.uint8))
    source = data.DownsampledImages(tmp_path, size=2)
    assert [document[0] for document in contents(source, "train")] == [1, 9, 10]

  def test_a_few_images_in_memory_at_a_time(self, tmp_path, monkeypatch):
    source = data.DownsampledImages(self.make(tmp_path), n_train=4, size=2)
    whole = contents(source, "train"), contents(source, "validation")
    monkeypatch.setattr("tvq_haiku.data.sources.imagenet._CHUNK", 2)
    assert (contents(source, "train"), contents(source, "validation")) == whole

  @pytest.mark.parametrize(
    "images",
    [
      np.zeros((2, 13), np.uint8),
      np.zeros((2, 12), np.int32),
      np.zeros(24, np.uint8),
      np.zeros((2, 2, 2, 3), np.uint8),
      np.asfortranarray(np.zeros((2, 12), np.uint8)),
    ],
  )
  def test_another_shape_or_type(self, tmp_path, images):
    self.make(tmp_path)
    self.write(tmp_path, "train_data_batch_2", images)
    with pytest.raises(
      ValueError, match=r"train_data_batch_2\.npz: `data` is .* not uint8\[n, 12\]"
    ):
      data.DownsampledImages(tmp_path, size=2).n_byte("train")

  def test_truncated_damaged_and_other_archives(self, tmp_path):
    self.make(tmp_path, n=(50, 4, 3))
    file = tmp_path / "train_data_batch_1.npz"
    whole = file.read_bytes()
    np.savez(tmp_path / "other", pixels=np.zeros(3))
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 1
    for content, message in (
      (whole[: len(whole) // 2], "is not an npz archive with an array `data`"),
      (b"", "is not an npz archive"),
      (b"text", "is not an npz archive"),
      ((tmp_path / "other.npz").read_bytes(), "with an array `data`"),
      (bytes(flipped), "is truncated or damaged: Bad CRC-32"),
    ):
      file.write_bytes(content)
      with pytest.raises(ValueError, match=r"train_data_batch_1\.npz .*" + message):
        contents(data.DownsampledImages(tmp_path, size=2), "train")

  def test_a_checksum_is_held_against_what_was_read(self, tmp_path):
    self.make(tmp_path)
    file = tmp_path / "train_data_batch_1.npz"
    np.savez_compressed(
      file, data=np.random.default_rng(0).integers(0, 256, (3000, 12)).astype(np.uint8)
    )
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 16] ^= 1  # CRC-32 in the archive's directory
    file.write_bytes(content)
    with pytest.raises(
      ValueError, match=r"train_data_batch_1\.npz is truncated or damaged: Bad CRC-32"
    ):
      contents(data.DownsampledImages(tmp_path, n_train=3000, size=2), "train")

  def test_missing_archives_and_empty_splits(self, tmp_path):
    self.make(tmp_path)
    with pytest.raises(ValueError, match="the split 'validation' is empty: 9 images in 2 archives"):
      list(data.DownsampledImages(tmp_path, size=2).read("validation"))
    (tmp_path / "val_data.npz").unlink()
    with pytest.raises(
      ValueError, match=r"has no val_data\.npz. Expected: train_data_batch_1\.npz"
    ):
      data.DownsampledImages(tmp_path, size=2)
    with pytest.raises(ValueError, match=r"has no train_data_batch_\*\.npz"):
      data.DownsampledImages(toy_datasets.write_text(tmp_path / "other").parent)
