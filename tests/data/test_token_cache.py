"""The cache of encoded splits: complete, encoded once, and written atomically."""

import json
import pathlib
import pwd
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from tvq_haiku import data
from tvq_haiku.data import token_cache, toy_datasets
from tvq_haiku.data.sources import base

BYTES = data.ByteVocabulary


def toy_books(root, n_byte=5000):
  return data.Books(toy_datasets.write_books(root, n_byte=n_byte))


def train_vocabulary(root, source):
  return data.train_pieces(source.sample(10**6, seed=0), root / "a.model", size=350)


def split_directories(cache):
  return {path for path in cache.iterdir() if not path.name.startswith(".")}


def decode_documents(split, vocabulary):
  """Yields the documents that the tokens of a split decode to."""
  start = 0
  for end in split.stream.ends:
    yield vocabulary.decode(split.stream.take(np.arange(start, end))["targets"])
    start = end


def sources_and_vocabularies(root):
  books = toy_books(root / "books")
  text = data.TextFiles(toy_datasets.write_text(root / "text", name="some.txt"))
  subwords = train_vocabulary(root, books)
  images = toy_datasets.write_images(root / "images")
  yield books, BYTES
  yield books, subwords
  yield text, BYTES
  yield text, subwords
  yield data.Enwik8(toy_datasets.write_text(root / "enwik8"), n_byte=60_000), BYTES
  yield data.DownsampledImages(images, n_train=40, size=8), BYTES


def test_tokens_decode_to_the_documents_and_statistics_match_them(tmp_path):
  for source, vocabulary in sources_and_vocabularies(tmp_path):
    for name in base.SPLITS:
      split = token_cache.open_split(source, name, vocabulary, tmp_path / "cache")
      documents = [chunk.content for chunk in source.read(name)]  # one chunk per document
      assert list(decode_documents(split, vocabulary)) == documents
      statistics = split.statistics
      assert statistics.n_byte == source.n_byte(name) == sum(map(len, documents))
      assert statistics.n_document == len(split.stream.ends) == len(documents)
      assert statistics.n_word == len(b" ".join(documents).split())
      assert statistics.n_token == len(split.stream)
      if vocabulary is BYTES:
        n_eos = statistics.n_document if source.has_eos else 0
        assert statistics.n_token == statistics.n_byte + n_eos
      tokens = split.stream.take(np.arange(len(split.stream)))["targets"]
      assert tokens.min() >= 1 and tokens.max() < vocabulary.size
      probabilities = np.unique(tokens, return_counts=True)[1] / len(tokens)
      entropy = -(probabilities * np.log2(probabilities)).sum()
      np.testing.assert_allclose(statistics.unigram_entropy, entropy)
      assert isinstance(split.stream.values, np.memmap)
      token_cache.verify(split)


def test_a_document_of_several_chunks_is_one_document(tmp_path):
  source = toy_books(tmp_path / "books")
  contents = [(b"", False), (b"It was ", False), (b"so.", False), (b"", True), (b"", True)]
  contents += [(b"Bath", False)]
  source.read = lambda split: (base.Chunk(*content, tmp_path) for content in contents)
  split = token_cache.open_split(source, "test", BYTES, tmp_path / "cache")
  assert list(decode_documents(split, BYTES)) == [b"It was so.", b"Bath"]
  assert split.stream.ends.tolist() == [11, 15]  # the last document has no last chunk, and no eos
  assert split.statistics.n_document == 2 and split.statistics.n_word == 4


def test_a_split_is_encoded_once(tmp_path, monkeypatch):
  source = toy_books(tmp_path / "books")
  first = token_cache.open_split(source, "train", BYTES, tmp_path / "cache")
  monkeypatch.setattr(type(source), "read", lambda *_: pytest.fail("the split was read again"))
  second = token_cache.open_split(source, "train", BYTES, tmp_path / "cache")
  assert second.statistics == first.statistics
  np.testing.assert_array_equal(second.stream.values, first.stream.values)


def test_changed_files_and_other_vocabularies_are_encoded_separately(tmp_path):
  source, cache = toy_books(tmp_path / "books"), tmp_path / "cache"
  token_cache.open_split(source, "test", BYTES, cache)
  before = split_directories(cache)
  token_cache.open_split(source, "test", train_vocabulary(tmp_path, source), cache)
  assert len(split_directories(cache)) == 2
  book = tmp_path / "books" / "test" / "6.txt"
  book.write_bytes(book.read_bytes().swapcase())  # of the same size
  changed = token_cache.open_split(data.Books(tmp_path / "books"), "test", BYTES, cache)
  assert next(decode_documents(changed, BYTES)) == book.read_bytes()
  assert len(split_directories(cache)) == 3 and before < split_directories(cache)


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: (path / "tokens.bin").write_bytes((path / "tokens.bin").read_bytes()[:-2]),
    lambda path: (path / "tokens.bin").unlink(),
    lambda path: (path / "facts.json").write_text("{"),
    lambda path: np.save(path / "ends.npy", np.array([3])),
    lambda path: (path / "ends.npy").write_bytes(b""),
  ],
  ids=["truncated", "no_tokens", "bad_statistics", "wrong_ends", "empty_ends"],
)
def test_an_incomplete_split_is_encoded_again(tmp_path, damage):
  source = toy_books(tmp_path / "books")
  first = token_cache.open_split(source, "test", BYTES, tmp_path / "cache")
  tokens = np.array(first.stream.values)
  (path,) = split_directories(tmp_path / "cache")
  damage(path)
  second = token_cache.open_split(source, "test", BYTES, tmp_path / "cache")
  assert second.statistics == first.statistics
  np.testing.assert_array_equal(second.stream.values, tokens)
  assert second.stream.ends.tolist() == first.stream.ends.tolist()


def test_verify_finds_a_changed_token(tmp_path, monkeypatch):
  monkeypatch.setattr(token_cache, "_CHECKSUM_CHUNK", 1000)
  source = toy_books(tmp_path / "books")
  token_cache.verify(token_cache.open_split(source, "test", BYTES, tmp_path / "cache"))
  (path,) = split_directories(tmp_path / "cache")
  tokens = bytearray((path / "tokens.bin").read_bytes())
  tokens[7000] ^= 1
  (path / "tokens.bin").write_bytes(tokens)
  split = token_cache.open_split(source, "test", BYTES, tmp_path / "cache")
  with pytest.raises(ValueError, match=r"tokens\.bin is damaged: remove its directory"):
    token_cache.verify(split)


def test_a_failed_encoding_leaves_no_files(tmp_path):
  toy_datasets.write_books(tmp_path / "books")
  (tmp_path / "books" / "train" / "4.txt").write_bytes(b"caf\xe9")
  with pytest.raises(ValueError, match=r"4\.txt is not UTF-8"):
    token_cache.open_split(data.Books(tmp_path / "books"), "train", BYTES, tmp_path / "cache")
  assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_text_that_is_not_utf8_cannot_be_encoded_as_subwords(tmp_path):
  vocabulary = train_vocabulary(tmp_path, toy_books(tmp_path / "books"))
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 100)
  source = data.TextFiles(tmp_path / "latin.txt")
  with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
    token_cache.open_split(source, "train", vocabulary, tmp_path / "cache")


def test_an_empty_split(tmp_path):
  toy_datasets.write_books(tmp_path / "books")
  (tmp_path / "books" / "test" / "6.txt").write_text("")
  with pytest.raises(ValueError, match="the split 'test' of pg19 is empty: use more data"):
    token_cache.open_split(data.Books(tmp_path / "books"), "test", BYTES, tmp_path / "cache")


def test_empty_books_are_not_documents(tmp_path):
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
  def read_slowly(split):
    for chunk in read(split):
      yield chunk
      print("chunk", flush=True)
      time.sleep(float(sys.argv[3]))
  source.read = read_slowly
try:
  split = token_cache.open_split(source, "train", data.ByteVocabulary, sys.argv[2])
  print(split.statistics.n_byte, flush=True)
except OSError as error:
  print(error, flush=True)
"""


def start_encoding(root, argument):
  """Encodes the books in a process: `argument` is "full", or the seconds to sleep per chunk."""
  paths = [str(root / "books"), str(root / "cache")]
  return subprocess.Popen(
    [sys.executable, "-c", ENCODE, *paths, argument],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
  )


def test_the_draft_of_a_killed_process_is_not_read(tmp_path):
  toy_datasets.write_books(tmp_path / "books", n_byte=5000)
  with start_encoding(tmp_path, "100") as process:
    assert process.stdout.readline() == "chunk\n"
    process.send_signal(signal.SIGKILL)
  assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ".draft"}
  split = token_cache.open_split(data.Books(tmp_path / "books"), "train", BYTES, tmp_path / "cache")
  assert split.statistics.n_byte == 20_000
  assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ""}


def test_one_process_encodes_while_the_other_waits(tmp_path, monkeypatch):
  toy_datasets.write_books(tmp_path / "books", n_byte=5000)
  with start_encoding(tmp_path, "0.3") as process:
    assert process.stdout.readline() == "chunk\n"
    source = data.Books(tmp_path / "books")
    monkeypatch.setattr(type(source), "read", lambda *_: pytest.fail("the split was encoded twice"))
    split = token_cache.open_split(source, "train", BYTES, tmp_path / "cache")
    assert split.statistics.n_byte == 20_000
    assert process.stdout.read().endswith("20000\n")


def test_a_full_disk_is_named_and_leaves_no_files(tmp_path):
  toy_datasets.write_books(tmp_path / "books", n_byte=5000)
  with start_encoding(tmp_path, "full") as process:
    out = process.stdout.read()
  assert out == (
    f"cannot write the tokens of pg19 to {tmp_path / 'cache'}: File too large. Free disk space, "
    "or choose a different --cache_dir.\n"
  )
  assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_an_unreadable_file_is_not_reported_as_a_full_disk(tmp_path):
  source = toy_books(tmp_path / "books")

  def broken(split):
    yield base.Chunk(b"It was", True, tmp_path)
    raise OSError(5, "Input/output error")

  source.read = broken
  with pytest.raises(
    ValueError, match=r"the split 'test' of pg19 cannot be read: .*Input/output error"
  ):
    token_cache.open_split(source, "test", BYTES, tmp_path / "cache")


def test_a_cache_directory_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"cannot write to the directory .*file: .*--cache_dir"):
    token_cache.open_split(toy_books(tmp_path / "books"), "test", BYTES, tmp_path / "file")


def test_files_on_disk(tmp_path):
  split = token_cache.open_split(toy_books(tmp_path / "books"), "test", BYTES, tmp_path / "cache")
  (path,) = (tmp_path / "cache").glob("pg19-test-*")
  assert {file.name for file in path.iterdir()} == {"tokens.bin", "ends.npy", "facts.json"}
  assert json.loads((path / "facts.json").read_text()) == {
    "n_document": 1,
    "n_byte": 5000,
    "n_word": split.statistics.n_word,
    "n_token": 5001,
    "unigram_entropy": split.statistics.unigram_entropy,
    "checksum": split.statistics.checksum,
    "vocabulary": "bytes",
    "dtype": "<u2",
    "offset": 0,
  }
  tokens = np.fromfile(path / "tokens.bin", "<u2")
  np.testing.assert_array_equal(tokens, split.stream.take(np.arange(5001))["targets"])
  assert np.load(path / "ends.npy").tolist() == [5001]


def test_the_default_directory_follows_xdg_cache_home(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
  assert token_cache.default_directory() == pathlib.Path("/caches/tvq_haiku")
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", "/home/anne")
  assert token_cache.default_directory() == pathlib.Path("/home/anne/.cache/tvq_haiku")


def test_without_a_home_directory_another_directory_must_be_given(tmp_path, monkeypatch):
  """The home directory comes from $HOME or from the user database."""
  for name in ("XDG_CACHE_HOME", "HOME"):
    monkeypatch.delenv(name, raising=False)
  no_user = {}
  monkeypatch.setattr(pwd, "getpwuid", no_user.__getitem__)
  source = toy_books(tmp_path / "books")
  with pytest.raises(ValueError, match="this user has no home directory: set --cache_dir"):
    token_cache.open_split(source, "test", BYTES)
  assert token_cache.open_split(source, "test", BYTES, tmp_path / "cache").statistics.n_byte == 5000


def test_reading_a_memory_map_takes_constant_memory(tmp_path):
  shape = (1 << 29,)  # 1 GiB, sparse
  values = np.memmap(tmp_path / "tokens.bin", np.uint16, mode="w+", shape=shape)
  stream = data.TokenStream(values, np.array(shape))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  batches = data.PackedBatches(stream, batch_size=8, sequence_len=8192)
  for _ in range(5):
    next(batches)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
