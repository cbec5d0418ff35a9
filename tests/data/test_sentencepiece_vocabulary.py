"""Vocabularies of pieces: what goes in comes out."""

import numpy as np
import pytest

from tvq_haiku import data

ODD = [
  "a\r\nb",
  "  before",
  "behind  ",
  "\ttab",
  "▁ is no space▁",
  "▁",
  "</s><pad><unk>",
  "naïve 🧀 \u00a0",
  "\ufeffmark",
  "e\u0301",
  "\x00",
  "ﬁne",
  "",
  " ",
  "\n\n\n",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  lines = data.austen()["Emma"][:100_000].decode().split("\n")
  file = tmp_path_factory.mktemp("vocab") / "new" / "a.model"
  return data.train_pieces(filter(None, lines), file, size=400)


def test_special_tokens_and_size(vocabulary):
  assert vocabulary.size == 400 and vocabulary.EOS == 1
  tokens = vocabulary.encode("It was so.\nWas it?")
  assert tokens.dtype == np.int32 and tokens.min() > 2 and tokens.max() < 400
  assert len(tokens) < len("It was so.\nWas it?")
  assert vocabulary.decode([0, *tokens.tolist(), 1]) == b"It was so.\nWas it?"


def test_what_goes_in_comes_out(vocabulary):
  texts = [*ODD, *(text[-20_000:].decode(errors="ignore") for text in data.austen().values())]
  for text in texts:
    assert vocabulary.decode(vocabulary.encode(text)) == text.encode(), text[:40]
    np.testing.assert_array_equal(vocabulary.encode(text.encode()), vocabulary.encode(text))


def test_a_file_is_the_same_vocabulary(vocabulary):
  again = data.PieceVocabulary(vocabulary.file)
  assert again.fingerprint == vocabulary.fingerprint
  np.testing.assert_array_equal(again.encode("Highbury"), vocabulary.encode("Highbury"))


def test_what_is_no_vocabulary(vocabulary, tmp_path):
  (tmp_path / "text.model").write_text("no model")
  with pytest.raises(ValueError, match=r"text\.model is not a SentencePiece model"):
    data.PieceVocabulary(tmp_path / "text.model")
  with pytest.raises(FileNotFoundError):
    data.PieceVocabulary(tmp_path / "missing.model")
  with pytest.raises(ValueError, match=r"n_vocab=401, not the 400 of .*a\.model"):
    vocabulary.check("config.n_vocab", 401)
  with pytest.raises(ValueError, match=r"\[0, 400\), got 400...400"):
    vocabulary.decode([400])


def test_other_numbers_of_special_tokens_are_refused(tmp_path):
  import sentencepiece

  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["It was so."] * 9),
    model_prefix=str(tmp_path / "other"),
    vocab_size=12,
    model_type="bpe",
    minloglevel=2,
  )
  with pytest.raises(
    ValueError, match=r"other\.model numbers pad, eos, unk and bos \(-1, 2, 0, 1\), not"
  ):
    data.PieceVocabulary(tmp_path / "other.model")


def test_a_vocabulary_that_loses_text_is_said_to(tmp_path, caplog):
  import sentencepiece

  lines = data.austen()["Emma"][:50_000].decode().split("\n")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_prefix=str(tmp_path / "lossy"),
    vocab_size=300,
    model_type="bpe",
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )
  data.PieceVocabulary(tmp_path / "lossy.model")
  assert "lossy.model loses text" in caplog.text


def test_what_the_lines_raise_is_raised(tmp_path):
  def lines():
    yield "a good line"
    raise ValueError("2.txt is not UTF-8")

  with pytest.raises(ValueError, match=r"^2\.txt is not UTF-8$"):
    data.train_pieces(lines(), tmp_path / "a.model", size=400)


@pytest.mark.parametrize("lines", [[], ["a b"]])
def test_too_little_text(lines, tmp_path):
  with pytest.raises(ValueError, match="no vocabulary of 400 pieces can be learned"):
    data.train_pieces(lines, tmp_path / "a.model", size=400)
  assert not list(tmp_path.iterdir())
