"""Batches for training and evaluation: their tokens, their order, and the share of each host."""

import time

import numpy as np
import pytest

from tvq_haiku import data

from data_helpers import all_tokens, random_stream


def concatenate(batches):
  """Joins consecutive windows of all examples, per field of a batch."""
  return {name: np.concatenate([b[name] for b in batches], axis=1) for name in batches[0]}


def test_batches_are_a_function_of_seed_and_step():
  stream = random_stream()
  make = lambda **kwargs: data.PackedBatches(stream, batch_size=2, sequence_len=9, **kwargs)
  first = make(seed=3)
  batches = [next(first) for _ in range(20)]
  for step in (0, 7, 19):
    resumed = make(seed=3, step=step)
    for name, value in next(resumed).items():
      np.testing.assert_array_equal(value, batches[step][name])
      assert value.dtype == np.int32 and value.shape == (2, 9)
    assert resumed.step == step + 1
  assert any((next(make(seed=4, step=i))["inputs"] != batches[i]["inputs"]).any() for i in range(3))


def test_an_epoch_reads_each_sequence_once_in_random_order():
  stream = data.TokenStream(np.arange(1001, dtype=np.int32), np.array([1001]))
  batches = data.PackedBatches(stream, batch_size=3, sequence_len=10)
  orders = set()
  for _ in range(3):
    targets = np.concatenate([next(batches)["targets"] for _ in range(batches.steps_per_epoch)])
    assert len(np.unique(targets)) == targets.size >= 960
    assert (np.diff(targets) == 1).all()
    assert (np.diff(targets[:, 0]) < 0).any()
    orders.add(tuple(targets[:, 0]))
  assert len(orders) == 3


@pytest.mark.parametrize("aligned, needed", [(False, 191), (True, 128)])
def test_a_stream_that_is_too_short_for_a_batch(aligned, needed):
  settings = dict(batch_size=2, sequence_len=64, aligned=aligned)
  message = f"the stream has {needed - 1} tokens, but .* need {needed}: reduce global_batch_size"
  with pytest.raises(ValueError, match=message):
    data.PackedBatches(random_stream((needed - 2,)), **settings)
  assert data.PackedBatches(random_stream((needed - 1,)), **settings).steps_per_epoch == 1


@pytest.mark.parametrize("batch_size, window_len", [(1, 110), (1, 16), (4, 7), (7, 100), (200, 1)])
def test_windows_read_every_token_exactly_once(batch_size, window_len):
  stream = random_stream()
  batches = list(data.windows(stream, batch_size=batch_size, window_len=window_len))
  assert len(batches) == data.count_windows(stream, batch_size=batch_size, window_len=window_len)
  assert all(value.shape == (batch_size, window_len) for b in batches for value in b.values())
  examples = concatenate(batches)
  is_token = examples["loss_mask"] == 1
  for name, expected in all_tokens(stream).items():
    np.testing.assert_array_equal(examples[name][is_token], expected)
  assert (examples["doc_ids"][~is_token] == -1).all()


def test_aligned_sequences_and_windows_contain_complete_documents():
  ends = np.arange(10, 80, 10)  # 7 documents of 10 tokens
  stream = data.TokenStream(np.arange(70, dtype=np.int32), ends)
  batches = data.PackedBatches(stream, batch_size=2, sequence_len=10, aligned=True)
  targets = np.concatenate([next(batches)["targets"] for _ in range(batches.steps_per_epoch)])
  assert (targets[:, 0] % 10 == 0).all() and len(np.unique(targets)) == 60
  for batch_size in (1, 2, 3, 4, 10):
    settings = dict(batch_size=batch_size, window_len=7, align=10)
    batches = list(data.windows(stream, **settings))
    assert len(batches) == data.count_windows(stream, **settings)
    examples = concatenate(batches)
    is_token = examples["loss_mask"] == 1
    np.testing.assert_array_equal(examples["targets"][is_token], np.arange(70))
    first_inputs = examples["inputs"][:, 0][is_token[:, 0]]
    assert (first_inputs == 1).all()  # every example starts with a document


def test_hosts_share_a_batch_without_overlap():
  stream = random_stream((2000,))
  make = lambda **kwargs: data.PackedBatches(
    stream, batch_size=4, sequence_len=16, seed=1, step=3, **kwargs
  )
  expected = next(make())
  for n_host in (2, 4):
    shares = [next(make(host=host, n_host=n_host)) for host in range(n_host)]
    for name, value in expected.items():
      np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), value)


@pytest.mark.parametrize(
  "hosts, message",
  [
    (dict(n_host=3), "n_host=3 must divide batch_size=4"),
    (dict(host=2, n_host=2), r"host=2 must lie in \[0, 2\)"),
    (dict(host=-1, n_host=2), r"host=-1 must lie in \[0, 2\)"),
  ],
)
def test_hosts_that_cannot_share_a_batch(hosts, message):
  with pytest.raises(ValueError, match=message):
    data.PackedBatches(random_stream((2000,)), batch_size=4, sequence_len=16, **hosts)


def test_moving_to_a_step_takes_constant_time():
  batches = data.PackedBatches(random_stream((5000,)), batch_size=2, sequence_len=16)
  batches.step = 10**12
  start = time.monotonic()
  next(batches)
  assert time.monotonic() - start < 1.0 and batches.step == 10**12 + 1
