"""Vocabulary, packing and the embedded corpus."""

import numpy as np
import pytest

from tvq_haiku import data
from tvq_haiku.data import compressors
from tvq_haiku.data import corpus


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


def test_stream_shifts_inputs_by_an_eos():
  stream = make_stream()
  assert stream.inputs[0] == 1 and (stream.inputs[1:] == stream.targets[:-1]).all()
  assert (np.flatnonzero(stream.targets == 1) == [40, 48, 109]).all()
  assert (np.bincount(stream.doc_ids) == [41, 8, 61]).all()


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
  stream = stream._replace(targets=np.arange(1001, dtype=np.int32))
  batches = data.PackedBatches(stream, batch_size=3, sequence_len=10)
  for _ in range(3):
    seen = np.concatenate([next(batches)["targets"].ravel() for _ in range(batches.steps_per_epoch)])
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
  for name, field in stream._asdict().items():
    np.testing.assert_array_equal(rows[name][real], field)
  assert (rows["doc_ids"][~real] == -1).all()


def test_corpus_is_the_six_novels():
  novels = data.austen()
  assert len(novels) == 6 and corpus.HELD_OUT in novels
  assert sum(map(len, novels.values())) == 4_025_029
  assert b"universally acknowledged" in novels["Pride And Prejudice"]


def test_compressors_learn_from_the_training_text():
  novels = data.austen()
  held_out, other = novels["Persuasion"][:30_000], novels["Emma"][:30_000]
  for compress in compressors.COMPRESSORS.values():
    alone = 8 * len(compress(held_out)) / len(held_out)
    assert 1.5 < compressors.bits_per_byte(compress, other, held_out) < alone
