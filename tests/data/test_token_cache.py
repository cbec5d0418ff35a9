"""Encoded splits: all that was read, built once, and never half."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tvq_haiku import data
from tvq_haiku.data import token_cache, toy_datasets
from tvq_haiku.data.sources import base

BYTES = data.ByteVocabulary


def texts(root, n_byte=5000):
  return data.Books(toy_datasets.write_books(root, n_byte=n_byte))


def decoded(split, vocabulary):
  """The documents that a split's tokens stand for."""
  stream, start = split.stream, 0
  for end in stream.ends:
    yield vocabulary.decode(stream.take(np.arange(start, end))["targets"])
    start = end


def make_sources(root):
  pieces = data.train_pieces(
    texts(root / "books").sample(10**6, seed=0), root / "a.model", size=350
  )
  yield texts(root / "books"), BYTES
  yield texts(root / "books"), pieces
  yield data.TextFiles(toy_datasets.write_text(root / "text", name="some.txt")), BYTES
  yield data.TextFiles(toy_datasets.write_text(root / "text", name="some.txt")), pieces
  yield data.Enwik8(toy_datasets.write_text(root / "enwik8"), n_byte=60_000), BYTES
  yield (
    data.DownsampledImages(toy_datasets.write_images(root / "images"), n_train=40, size=8),
    BYTES,
  )


def test_round_trips_and_counts(tmp_path):
  """Bytes, pieces and pixels decode to what went in, and the counts add up to the files."""
  for source, vocabulary in make_sources(tmp_path):
    for name in base.SPLITS:
      split = token_cache.open_split(source, name, vocabulary, tmp_path / "cache")
      raw = [piece.content for piece in source.read(name)]
      assert b"".join(decoded(split, vocabulary)) == b"".join(raw)
      facts = split.statistics
      assert facts.n_byte == source.n_byte(name) == sum(map(len, raw))
      assert facts.n_document == len(split.stream.ends) == len(raw)
      assert facts.n_word == len(b" ".join(raw).split())
      assert facts.n_token == len(split.stream)
      if vocabulary is BYTES:
        assert facts.n_token == facts.n_byte + source.has_eos * facts.n_document
      tokens = split.stream.take(np.arange(len(split.stream)))["targets"]
      assert tokens.min() >= 1 and tokens.max() < vocabulary.size
      shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
      np.testing.assert_allclose(facts.unigram_entropy, -(shares * np.log2(shares)).sum())
      assert isinstance(split.stream.values, np.memmap)


def test_a_split_is_encoded_once(tmp_path, monkeypatch):
  source = texts(tmp_path / "books")
  first = token_cache.open_split(source, "train", BYTES, tmp_path / "cache")
  monkeypatch.setattr(type(source), "read", lambda *_: pytest.fail("read again"))
  again = token_cache.open_split(source, "train", BYTES, tmp_path / "cache")
  assert again.statistics == first.statistics
  np.testing.assert_array_equal(again.stream.values, first.stream.values)


def test_other_files_and_other_vocabularies_have_their_own(tmp_path):
  source = texts(tmp_path / "books")
  places = lambda: {
    path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")
  }
  token_cache.open_split(source, "test", BYTES, tmp_path / "cache")
  one = places()
  pieces = data.train_pieces(source.sample(10**6, seed=0), tmp_path / "a.model", size=350)
  token_cache.open_split(source, "test", pieces, tmp_path / "cache")
  book = tmp_path / "books" / "test" / "6.txt"
  book.write_bytes(book.read_bytes().swapcase())  # as long as before
  changed = token_cache.open_split(
    data.Books(tmp_path / "books"), "test", BYTES, tmp_path / "cache"
  )
  assert next(decoded(changed, BYTES)) == book.read_bytes()
  assert len(places()) == 3 and one < places()


@pytest.mark.parametrize("harm", ["truncate", "remove", "facts", "ends"])
def test_what_is_not_whole_is_encoded_again(tmp_path, harm):
  source = texts(tmp_path / "books")
  token_cache.open_split(source, "test", BYTES, tmp_path / "cache")
  (place,) = (tmp_path / "cache").glob("pg19*")
  tokens = (place / "tokens.bin").read_bytes()
  match harm:
    case "truncate":
      (place / "tokens.bin").write_bytes(tokens[:-2])
    case "remove":
      (place / "tokens.bin").unlink()
    case "facts":
      (place / "facts.json").write_text("{")
    case "ends":
      np.save(place / "ends.npy", np.array([3]))
  token_cache.open_split(source, "test", BYTES, tmp_path / "cache")
  assert (place / "tokens.bin").read_bytes() == tokens


def test_what_breaks_off_leaves_nothing(tmp_path):
  toy_datasets.write_books(tmp_path / "books")
  (tmp_path / "books" / "train" / "4.txt").write_bytes(b"caf\xe9")
  with pytest.raises(ValueError, match=r"4\.txt is not UTF-8"):
    token_cache.open_split(data.Books(tmp_path / "books"), "train", BYTES, tmp_path / "cache")
  assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_text_that_is_not_utf8_has_no_pieces(tmp_path):
  lines = texts(tmp_path / "books").sample(10**6, seed=0)
  pieces = data.train_pieces(lines, tmp_path / "a.model", size=350)
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 100)
  with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
    token_cache.open_split(
      data.TextFiles(tmp_path / "latin.txt"), "train", pieces, tmp_path / "cache"
    )


def test_an_empty_split(tmp_path):
  toy_datasets.write_books(tmp_path / "books")
  (tmp_path / "books" / "test" / "6.txt").write_text("")
  with pytest.raises(ValueError, match="the split 'test' of pg19 is empty"):
    token_cache.open_split(data.Books(tmp_path / "books"), "test", BYTES, tmp_path / "cache")


def test_empty_books_are_no_documents(tmp_path):
  toy_datasets.write_books(tmp_path / "books", n_byte=100)
  (tmp_path / "books" / "train" / "2.txt").write_text("")
  split = token_cache.open_split(data.Books(tmp_path / "books"), "train", BYTES, tmp_path / "cache")
  assert split.statistics.n_document == 3 and split.statistics.n_token == 303


ENCODE = """
import resource, sys, time
from tvq_haiku import data
from tvq_haiku.data import token_cache
source = data.Books(sys.argv[1])
if sys.argv[3:] == ["full"]:
  resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
elif sys.argv[3:]:
  read = source.read
  def slowly(split):
    for piece in read(split):
      yield piece
      print("piece", flush=True)
      time.sleep(float(sys.argv[3]))
  source.read = slowly
try:
  print(token_cache.open_split(source, "train", data.ByteVocabulary, sys.argv[2]).statistics.n_byte, flush=True)
except OSError as error:
  print(error, flush=True)
"""


def encode(tmp_path, *arguments):
  places = [str(tmp_path / "books"), str(tmp_path / "cache")]
  return subprocess.Popen(
    [sys.executable, "-c", ENCODE, *places, *arguments],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )


def test_a_killed_process_leaves_nothing_that_is_read(tmp_path):
  toy_datasets.write_books(tmp_path / "books", n_byte=5000)
  with encode(tmp_path, "100") as process:
    assert process.stdout.readline() == "piece\n"
    process.send_signal(signal.SIGKILL)
  left = {path.suffix for path in (tmp_path / "cache").iterdir()}
  assert left == {".lock", ".draft"}
  split = token_cache.open_split(data.Books(tmp_path / "books"), "train", BYTES, tmp_path / "cache")
  assert split.statistics.n_byte == 20_000
  assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ""}


def test_of_two_processes_one_encodes_and_the_other_waits(tmp_path, monkeypatch):
  toy_datasets.write_books(tmp_path / "books", n_byte=5000)
  with encode(tmp_path, "0.3") as process:
    assert process.stdout.readline() == "piece\n"
    source = data.Books(tmp_path / "books")
    monkeypatch.setattr(type(source), "read", lambda *_: pytest.fail("encoded twice"))
    assert (
      token_cache.open_split(source, "train", BYTES, tmp_path / "cache").statistics.n_byte == 20_000
    )
    assert process.stdout.read().endswith("20000\n")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
  toy_datasets.write_books(tmp_path / "books", n_byte=5000)
  with encode(tmp_path, "full") as process:
    out = process.stdout.read()
  assert out == (
    f"cannot write the tokens of pg19 to {tmp_path / 'cache'}: File too large. Make room, "
    "or name another --cache_dir.\n"
  )
  assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_cannot_be_read_is_no_full_disk(tmp_path):
  source = texts(tmp_path / "books")

  def broken(split):
    yield base.Chunk(b"It was", True, tmp_path)
    raise OSError(5, "Input/output error")

  source.read = broken
  with pytest.raises(
    ValueError, match=r"the split 'test' of pg19 cannot be read: .*Input/output error"
  ):
    token_cache.open_split(source, "test", BYTES, tmp_path / "cache")


def test_empty_ends_are_not_whole(tmp_path):
  source = texts(tmp_path / "books")
  first = token_cache.open_split(source, "test", BYTES, tmp_path / "cache")
  (place,) = (tmp_path / "cache").glob("pg19*")
  (place / "ends.npy").write_bytes(b"")
  assert (
    token_cache.open_split(source, "test", BYTES, tmp_path / "cache").statistics == first.statistics
  )


def test_a_directory_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"cannot write to the directory .*file"):
    token_cache.open_split(texts(tmp_path / "books"), "test", BYTES, tmp_path / "file")


def test_facts_are_json(tmp_path):
  token_cache.open_split(texts(tmp_path / "books"), "test", BYTES, tmp_path / "cache")
  (place,) = (tmp_path / "cache").glob("pg19-test-*")
  facts = json.loads((place / "facts.json").read_text())
  assert facts["n_byte"] == 5000 and facts["vocabulary"] == "bytes" and facts["dtype"] == "<u2"
  shutil.rmtree(place)


def test_memory_stays_flat(tmp_path):
  """A stream of a file reads what is asked for, not the file."""
  values = np.memmap(
    tmp_path / "tokens.bin", np.uint16, mode="w+", shape=(1 << 29,)
  )  # 1 GiB, sparse
  stream = data.TokenStream(values, np.array([1 << 29]))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  batches = data.PackedBatches(stream, batch_size=8, sequence_len=8192)
  for _ in range(5):
    next(batches)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
