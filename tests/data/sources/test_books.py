"""Books in the layout of PG-19: a book is a document, and missing books are reported."""

import pytest

from tvq_haiku import data
from tvq_haiku.data import toy_datasets

from data_helpers import read_documents
from launching import run, workspace

assert workspace  # a fixture


def test_each_book_is_a_document(tmp_path, capsys):
  source = data.Books(toy_datasets.write_books(tmp_path, n_byte=500))
  novels = [text for _, text in sorted(data.austen().items())]
  assert read_documents(source, "train") == [text[:500] for text in novels[:4]]
  assert read_documents(source, "test") == [novels[5][:500]]
  assert source.missing() == [] and source.has_eos
  assert capsys.readouterr() == ("", "")


def test_missing_books_are_logged_once(tmp_path, capsys):
  toy_datasets.write_books(tmp_path, n_byte=100)
  (tmp_path / "train" / "2.txt").unlink()
  (tmp_path / "train" / "4.txt").unlink()
  source = data.Books(tmp_path)
  read_documents(source, "train")
  assert source.missing() == ["2", "4"]
  assert capsys.readouterr().err == (
    f"warning: {tmp_path}/metadata.csv lists 2 books that are missing from the splits, "
    "such as 2.txt.\n"
  )


def test_without_metadata_no_book_is_missing(tmp_path, capsys):
  toy_datasets.write_books(tmp_path, n_byte=100)
  (tmp_path / "train" / "2.txt").unlink()
  (tmp_path / "metadata.csv").unlink()
  assert data.Books(tmp_path).missing() == []
  assert not capsys.readouterr().err


def test_a_launched_command_logs_missing_books_once(workspace):
  toy_datasets.write_books(workspace / "books", n_byte=100)
  (workspace / "books" / "train" / "2.txt").unlink()
  status, out, err = run(
    "python -m experiments.pg19 --command=info --size=cpu --data_dir=books --workdir=new", workspace
  )
  assert status == 0 and "300 bytes" in out, err
  assert err == (
    "warning: books/metadata.csv lists 1 books that are missing from the splits, such as 2.txt.\n"
  )


def test_sample_reads_training_books_in_a_seeded_order(tmp_path):
  source = data.Books(toy_datasets.write_books(tmp_path, n_byte=500))
  lines = {seed: list(source.sample(700, seed=seed)) for seed in range(3)}
  training = b"\n".join(read_documents(source, "train")).decode().split("\n")
  for seed in range(3):
    assert list(source.sample(700, seed=seed)) == lines[seed]
    assert set(lines[seed][:-1]) <= set(training)  # the last line may be incomplete
    assert 600 < sum(map(len, lines[seed])) <= 700
  assert len({sampled[0] for sampled in lines.values()}) > 1


def test_a_book_that_is_not_utf8(tmp_path):
  toy_datasets.write_books(tmp_path, n_byte=100)
  (tmp_path / "validation" / "5.txt").write_bytes(b"caf\xe9 au lait")
  with pytest.raises(ValueError, match=r"validation/5\.txt is not UTF-8: .* at byte 3"):
    read_documents(data.Books(tmp_path), "validation")


def test_broken_links_are_refused(tmp_path):
  toy_datasets.write_books(tmp_path, n_byte=100)
  (tmp_path / "train" / "7.txt").symlink_to("/nowhere/7.txt")
  with pytest.raises(ValueError, match=r"train/7\.txt is a broken link \(to /nowhere/7\.txt\)"):
    data.Books(tmp_path)


def test_missing_and_empty_splits(tmp_path):
  with pytest.raises(ValueError, match="has no train or validation or test"):
    data.Books(tmp_path)
  toy_datasets.write_books(tmp_path, n_byte=100)
  for file in (tmp_path / "test").iterdir():
    file.unlink()
  with pytest.raises(ValueError, match=r"the split 'test' is empty: .*test contains no \.txt"):
    data.Books(tmp_path)
