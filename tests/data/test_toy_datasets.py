"""Small datasets: in the formats of the real ones, and written once."""

import numpy as np

from tvq_haiku import data
from tvq_haiku.data import toy_datasets
from tvq_haiku.data.sources import base

from data_helpers import read_documents


def test_text_has_the_requested_size(tmp_path):
  file = toy_datasets.write_text(tmp_path / "new", n_byte=1000, name="a.txt")
  assert file == tmp_path / "new" / "a.txt" and file.stat().st_size == 1000
  assert data.Enwik8(file, n_byte=1000).n_byte("train") == 900


def test_books_have_the_requested_size(tmp_path):
  source = data.Books(toy_datasets.write_books(tmp_path, n_byte=100))
  sizes = [[len(document) for document in read_documents(source, s)] for s in base.SPLITS]
  assert sizes == [[100] * 4, [100], [100]]


def test_images_vary_and_have_the_requested_size(tmp_path):
  root = toy_datasets.write_images(tmp_path, size=4, n_image=13)
  source = data.DownsampledImages(root, n_train=10, size=4)
  images = [read_documents(source, split) for split in base.SPLITS]
  assert [len(documents) for documents in images] == [10, 3, 2]
  assert len({image for documents in images for image in documents}) == 15
  first = np.frombuffer(images[0][0], np.uint8).reshape(16, 3)
  assert 1 < len(np.unique(first, axis=0)) < 16


def test_existing_files_are_kept(tmp_path):
  writers = (toy_datasets.write_text, toy_datasets.write_books, toy_datasets.write_images)
  for write in writers:
    write(tmp_path)
  before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.txt")}
  before |= {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.npz")}
  assert len(before) == 9
  for write in writers:
    write(tmp_path)
  assert {file: file.stat().st_mtime_ns for file in before} == before
