"""Vocabulary, packing and the embedded corpus."""

import time

import numpy as np
import pytest

from tvq_haiku import data
from tvq_haiku.data import austen_novels


def test_every_byte_survives():
  raw = bytes(range(256))
  tokens = data.ByteVocabulary.encode(raw)
  assert tokens.min() == 3 and tokens.max() == data.ByteVocabulary.SIZE - 1
  assert data.ByteVocabulary.decode(tokens) == raw
  assert data.ByteVocabulary.decode(data.ByteVocabulary.encode("Tränen…")).decode() == "Tränen…"
  with pytest.raises(ValueError, match=r"\[0, 259\), got 259...259"):
    data.ByteVocabulary.decode([259])


def make_stream(lengths=(40, 7, 60), seed=0):
  rng = np.random.default_rng(seed)
  return data.stream_of([rng.integers(3, 259, n) for n in lengths])


def whole(stream):
  return stream.take(np.arange(len(stream)))


def test_stream_shifts_inputs_by_an_eos():
  stream = make_stream()
  batch = whole(stream)
  assert batch["inputs"][0] == 1 and (batch["inputs"][1:] == batch["targets"][:-1]).all()
  assert (np.flatnonzero(batch["targets"] == 1) == [40, 48, 109]).all()
  assert (np.bincount(batch["doc_ids"]) == [41, 8, 61]).all()


def test_documents_without_eos_begin_after_one_all_the_same():
  values = np.arange(12, dtype=np.uint8)
  stream = data.TokenStream(values, np.array([4, 8, 12]), offset=3)
  batch = whole(stream)
  assert batch["inputs"].tolist() == [1, 3, 4, 5, 1, 7, 8, 9, 1, 11, 12, 13]
  assert (batch["targets"] == values + 3).all() and batch["targets"].dtype == np.int32
  assert batch["doc_ids"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
  part = stream.take(np.array([[5, 6], [8, 0]]))
  assert part["inputs"].tolist() == [[7, 8], [1, 1]]


@pytest.mark.parametrize("documents", [[], [np.array([], np.int32)], [np.array([3]), np.array([])]])
def test_empty_documents_are_refused(documents):
  with pytest.raises(ValueError, match="no document may be empty"):
    data.stream_of(documents)


def test_batches_are_a_function_of_seed_and_step():
  stream = make_stream()
  make = lambda **kw: data.PackedBatches(stream, batch_size=2, sequence_len=9, **kw)
  first = make(seed=3)
  batches = [next(first) for _ in range(20)]
  for start in (0, 7, 19):
    again = make(seed=3, step=start)
    for key, value in next(again).items():
      np.testing.assert_array_equal(value, batches[start][key])
      assert value.dtype == np.int32 and value.shape == (2, 9)
  assert any((next(make(seed=4, step=i))["inputs"] != batches[i]["inputs"]).any() for i in range(3))


def test_an_epoch_reads_each_sequence_once():
  stream = make_stream((1000,))
  stream = data.TokenStream(np.arange(1001, dtype=np.int32), stream.ends)
  batches = data.PackedBatches(stream, batch_size=3, sequence_len=10)
  for _ in range(3):
    seen = np.concatenate(
      [next(batches)["targets"].ravel() for _ in range(batches.steps_per_epoch)]
    )
    assert len(np.unique(seen)) == len(seen) >= 960
    assert (np.diff(seen.reshape(-1, 10)) == 1).all()


def test_too_little_text_for_a_batch():
  with pytest.raises(ValueError, match="110 tokens do not fill one batch of 2 sequences of 64"):
    data.PackedBatches(make_stream(), batch_size=2, sequence_len=64)


@pytest.mark.parametrize("batch_size, window_len", [(1, 110), (1, 16), (4, 7), (7, 100), (200, 1)])
def test_windows_read_every_token_exactly_once(batch_size, window_len):
  stream = make_stream()
  batches = list(data.windows(stream, batch_size=batch_size, window_len=window_len))
  rows = {key: np.concatenate([b[key] for b in batches], axis=1) for key in batches[0]}
  real = rows["loss_mask"] == 1
  assert len(batches) == data.count_windows(stream, batch_size=batch_size, window_len=window_len)
  for name, field in whole(stream).items():
    np.testing.assert_array_equal(rows[name][real], field)
  assert (rows["doc_ids"][~real] == -1).all()


@pytest.mark.parametrize("n, ends", [(3, [3]), (4, [4]), (9, [4, 8, 9]), (12, [4, 8, 12])])
def test_the_head_of_a_stream(n, ends):
  stream = data.TokenStream(np.arange(12), np.array([4, 8, 12]), offset=2).head(n)
  assert len(stream) == n and stream.ends.tolist() == ends and stream.offset == 2


def test_aligned_sequences_and_rows_cut_no_document():
  stream = data.TokenStream(
    np.arange(70, dtype=np.int32), np.arange(10, 80, 10)
  )  # 7 documents of 10
  batches = data.PackedBatches(stream, batch_size=2, sequence_len=10, aligned=True)
  seen = np.concatenate([next(batches)["targets"] for _ in range(batches.steps_per_epoch)])
  assert (seen[:, 0] % 10 == 0).all() and len(np.unique(seen)) == 60
  for rows in (1, 2, 3, 4, 10):
    read = list(data.windows(stream, batch_size=rows, window_len=7, align=10))
    rows_read = {key: np.concatenate([b[key] for b in read], axis=1) for key in read[0]}
    real = rows_read["loss_mask"] == 1
    np.testing.assert_array_equal(rows_read["targets"][real], np.arange(70))
    assert (rows_read["inputs"][:, 0][real[:, 0]] == 1).all()  # each row begins with a document
    assert len(read) == data.count_windows(stream, batch_size=rows, window_len=7, align=10)


def test_hosts_share_a_batch_without_overlap():
  stream = make_stream((2000,))
  make = lambda **kw: data.PackedBatches(
    stream, batch_size=4, sequence_len=16, seed=1, step=3, **kw
  )
  for _ in range(2):
    together = next(make())
    for n_host in (2, 4):
      shares = [next(make(host=host, n_host=n_host)) for host in range(n_host)]
      for key, value in together.items():
        np.testing.assert_array_equal(np.concatenate([share[key] for share in shares]), value)
  for wrong in (dict(n_host=3), dict(host=2, n_host=2), dict(host=-1, n_host=2)):
    with pytest.raises(ValueError, match="has no share of batch_size=4"):
      make(**wrong)


def test_going_to_a_step_takes_constant_time():
  stream = make_stream((5000,))
  batches = data.PackedBatches(stream, batch_size=2, sequence_len=16)
  batches.step = 10**12
  start = time.monotonic()
  next(batches)
  assert time.monotonic() - start < 1.0 and batches.step == 10**12 + 1


def test_corpus_is_the_six_novels():
  novels = data.austen()
  assert len(novels) == 6 and austen_novels.HELD_OUT in novels
  assert sum(map(len, novels.values())) == 4_025_029
  assert b"universally acknowledged" in novels["Pride And Prejudice"]
