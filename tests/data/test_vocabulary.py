"""The vocabulary of bytes."""

import numpy as np
import pytest

from tvq_haiku import data
from tvq_haiku.data import vocabulary

BYTES = data.ByteVocabulary


def test_every_byte_is_restored():
  raw = bytes(range(256))
  tokens = BYTES.encode(raw)
  np.testing.assert_array_equal(tokens, np.arange(3, BYTES.SIZE))
  assert tokens.dtype == np.int32 and BYTES.size == BYTES.SIZE
  assert BYTES.decode(tokens) == raw


def test_strings_are_encoded_as_utf8():
  np.testing.assert_array_equal(BYTES.encode("Tränen…"), BYTES.encode("Tränen…".encode()))
  assert BYTES.decode(BYTES.encode("Tränen…")).decode() == "Tränen…"


def test_special_tokens_have_no_bytes():
  assert BYTES.decode([[BYTES.PAD, 69], [BYTES.EOS, BYTES.UNK]]) == b"B"


@pytest.mark.parametrize("token", [-1, 259])
def test_tokens_outside_of_the_vocabulary(token):
  with pytest.raises(ValueError, match=rf"\[0, 259\), got {token}...{token}"):
    BYTES.decode([token])


def test_a_model_of_a_different_size():
  BYTES.check("score", 259)
  with pytest.raises(ValueError, match=r"^score: the model has n_vocab=260, not the 259 tokens"):
    BYTES.check("score", 260)


def test_anything_but_a_vocabulary_is_refused():
  vocabulary.check_vocabulary("f", BYTES, 259)
  with pytest.raises(ValueError, match=r"^f: the model has n_vocab=260"):
    vocabulary.check_vocabulary("f", BYTES, 260)
  for value in (None, "vocab.model", {}):
    with pytest.raises(TypeError, match=r"^f: vocabulary=.* must be tvq_haiku.data.ByteVocabulary"):
      vocabulary.check_vocabulary("f", value, 259)
