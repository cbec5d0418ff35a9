"""Archives of images: their pixels, their splits, and errors that name the archive."""

import numpy as np
import pytest

from tvq_haiku import data
from tvq_haiku.data import toy_datasets
from tvq_haiku.data.sources import imagenet

from data_helpers import read_documents


def write_archives(root, n_image=(5, 4, 3)):
  """Writes 2 x 2 images; the byte 16·i + 4·c + 2·y + x is channel c of pixel (y, x) of image i."""
  n_before = 0
  names = ("train_data_batch_1", "train_data_batch_2", "val_data")
  for n, name in zip(n_image, names, strict=True):
    number = n_before + np.arange(n)[:, None, None, None]
    images = number * 16 + np.arange(12).reshape(3, 2, 2)
    np.savez(root / name, data=images.reshape(n, -1).astype(np.uint8), labels=np.zeros(n))
    n_before += n
  return root


@pytest.mark.parametrize("n_train", [3, 5, 7])
def test_pixels_are_in_rows_with_adjacent_channels(tmp_path, n_train):
  source = data.DownsampledImages(write_archives(tmp_path), n_train=n_train, size=2)
  expected = {"train": range(n_train), "validation": range(n_train, 9), "test": range(9, 12)}
  for split, numbers in expected.items():
    assert read_documents(source, split) == [
      bytes(
        16 * i + channel * 4 + row * 2 + column
        for row in range(2)
        for column in range(2)
        for channel in range(3)
      )
      for i in numbers
    ]
  assert not source.has_eos and source.document_len == 12


def test_archives_are_read_in_the_order_of_their_numbers(tmp_path):
  for number in (10, 9, 1):
    np.savez(tmp_path / f"train_data_batch_{number}", data=np.full((1, 12), number, np.uint8))
  np.savez(tmp_path / "val_data", data=np.zeros((1, 12), np.uint8))
  source = data.DownsampledImages(tmp_path, size=2)
  assert [document[0] for document in read_documents(source, "train")] == [1, 9, 10]


def test_documents_do_not_depend_on_the_chunk_size(tmp_path, monkeypatch):
  source = data.DownsampledImages(write_archives(tmp_path), n_train=4, size=2)
  splits = [read_documents(source, split) for split in ("train", "validation")]
  monkeypatch.setattr(imagenet, "_CHUNK", 2)
  assert [read_documents(source, split) for split in ("train", "validation")] == splits


@pytest.mark.parametrize(
  "images, description",
  [
    (np.zeros((2, 13), np.uint8), r"uint8\[2, 13\]"),
    (np.zeros((2, 12), np.int32), r"int32\[2, 12\]"),
    (np.zeros(24, np.uint8), r"uint8\[24\]"),
    (np.zeros((2, 2, 2, 3), np.uint8), r"uint8\[2, 2, 2, 3\]"),
    (np.asfortranarray(np.zeros((2, 12), np.uint8)), r"uint8\[2, 12\] in Fortran order"),
  ],
)
def test_a_different_shape_or_dtype(tmp_path, images, description):
  write_archives(tmp_path)
  np.savez(tmp_path / "train_data_batch_2", data=images)
  with pytest.raises(
    ValueError, match=rf"train_data_batch_2\.npz: `data` is {description}, not uint8\[n, 12\]"
  ):
    data.DownsampledImages(tmp_path, size=2).n_byte("train")


def test_truncated_damaged_and_other_archives(tmp_path):
  write_archives(tmp_path, n_image=(50, 4, 3))
  file = tmp_path / "train_data_batch_1.npz"
  intact = file.read_bytes()
  np.savez(tmp_path / "other", pixels=np.zeros(3))
  flipped = bytearray(intact)
  flipped[len(intact) // 4] ^= 1
  for content, message in (
    (intact[: len(intact) // 2], "is not an npz archive with an array `data`"),
    (b"", "is not an npz archive"),
    (b"text", "is not an npz archive"),
    ((tmp_path / "other.npz").read_bytes(), "with an array `data`"),
    (bytes(flipped), "is truncated or damaged: Bad CRC-32"),
  ):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"train_data_batch_1\.npz .*" + message):
      read_documents(data.DownsampledImages(tmp_path, size=2), "train")


def test_the_checksum_of_an_archive_is_verified(tmp_path):
  write_archives(tmp_path)
  file = tmp_path / "train_data_batch_1.npz"
  images = np.random.default_rng(0).integers(0, 256, (3000, 12)).astype(np.uint8)
  np.savez_compressed(file, data=images)
  content = bytearray(file.read_bytes())
  content[content.index(b"PK\x01\x02") + 16] ^= 1  # CRC-32 in the archive's directory
  file.write_bytes(content)
  with pytest.raises(
    ValueError, match=r"train_data_batch_1\.npz is truncated or damaged: Bad CRC-32"
  ):
    read_documents(data.DownsampledImages(tmp_path, n_train=3000, size=2), "train")


def test_missing_archives_and_empty_splits(tmp_path):
  write_archives(tmp_path)
  with pytest.raises(
    ValueError, match=r"the split 'validation' is empty: .* has 9 images in 2 archives"
  ):
    list(data.DownsampledImages(tmp_path, size=2).read("validation"))
  (tmp_path / "val_data.npz").unlink()
  with pytest.raises(ValueError, match=r"has no val_data\.npz. Expected: train_data_batch_1\.npz"):
    data.DownsampledImages(tmp_path, size=2)
  with pytest.raises(ValueError, match=r"has no train_data_batch_\*\.npz"):
    data.DownsampledImages(toy_datasets.write_text(tmp_path / "other").parent)
