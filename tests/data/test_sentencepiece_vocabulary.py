"""Subword vocabularies: lossless if trained by `train_pieces`, and checked when they are read."""

import re

import numpy as np
import pytest
import sentencepiece

from tvq_haiku import data
from tvq_haiku.data import toy_datasets

from launching import run, workspace

assert workspace  # a fixture

UNUSUAL_TEXTS = [
  "a\r\nb",
  "  before",
  "behind  ",
  "\ttab",
  "▁ is not a space▁",
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


def train_lossy(prefix):
  """Trains a vocabulary that normalizes its text; writes it to `prefix`.model."""
  lines = data.austen()["Emma"][:50_000].decode().split("\n")
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_prefix=str(prefix),
    vocab_size=300,
    model_type="bpe",
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    minloglevel=2,
  )


def test_special_tokens_and_size(vocabulary):
  assert vocabulary.size == 400 and vocabulary.EOS == 1
  tokens = vocabulary.encode("It was so.\nWas it?")
  assert tokens.dtype == np.int32 and tokens.min() > 2 and tokens.max() < 400
  assert len(tokens) < len("It was so.\nWas it?")
  assert vocabulary.decode([0, *tokens.tolist(), 1]) == b"It was so.\nWas it?"


def test_a_trained_vocabulary_is_lossless(vocabulary):
  novels = [text[-20_000:].decode(errors="ignore") for text in data.austen().values()]
  for text in [*UNUSUAL_TEXTS, *novels]:
    assert vocabulary.decode(vocabulary.encode(text)) == text.encode(), text[:40]
    np.testing.assert_array_equal(vocabulary.encode(text.encode()), vocabulary.encode(text))


@pytest.mark.parametrize("text", ["🧀", "It was 日本\n", "▁", b"\xff\x00 It was \xc3", b"\xe6\x97"])
def test_tokens_have_exact_bytes_one_at_a_time(vocabulary, text):
  tokens, raw = vocabulary.encode(text), text if isinstance(text, bytes) else text.encode()
  assert b"".join(vocabulary.decode([token]) for token in tokens) == raw
  assert vocabulary.decode(tokens) == raw


def test_random_bytes_are_restored(vocabulary):
  rng = np.random.default_rng(0)
  for n in range(60):
    raw = rng.integers(0, 256, n).astype(np.uint8).tobytes()
    assert vocabulary.decode(vocabulary.encode(raw)) == raw


def test_decoding_agrees_with_sentencepiece(vocabulary):
  processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
  rng = np.random.default_rng(0)
  not_bytes = [token for token in range(vocabulary.size) if not processor.is_byte(token)]
  for _ in range(100):
    tokens = rng.choice(not_bytes, 20).tolist()
    assert vocabulary.decode(tokens) == processor.decode(tokens).encode()


def test_bytes_that_a_vocabulary_has_no_tokens_for(tmp_path):
  train_lossy(tmp_path / "lossy")
  vocabulary = data.PieceVocabulary(tmp_path / "lossy.model")
  with pytest.raises(UnicodeDecodeError):
    vocabulary.encode(b"so\xff")


def test_a_vocabulary_of_a_text_without_spaces_is_lossless(tmp_path, capsys):
  vocabulary = data.train_pieces(["日本語"] * 9, tmp_path / "a.model", size=266)
  for text in UNUSUAL_TEXTS:
    assert vocabulary.decode(vocabulary.encode(text)) == text.encode()
  assert not capsys.readouterr().err


def one_line(n_byte, space=" "):
  """Returns the beginning of a novel, with `space` in place of each white space."""
  return space.join(data.austen()["Emma"][:n_byte].decode().split())


def train(lines, tmp_path, size=400):
  return data.train_pieces(lines, tmp_path / "a.model", size=size).fingerprint


def test_a_text_in_one_line_is_split_at_white_space(tmp_path):
  """The vocabulary is that of the same words in short lines."""
  text = one_line(140_000)
  assert len(text.encode()) > 1 << 17
  in_short_lines = re.findall(r".{1,900}(?= |$)", text)
  assert "".join(in_short_lines) == text
  assert train([text], tmp_path) == train(in_short_lines, tmp_path)
  data.train_pieces([one_line(140_000, "\r")], tmp_path / "b.model", size=400)


def test_long_lines_are_used_next_to_short_ones(tmp_path):
  short, long = ["It was so."] * 9, " zebra" * 20_000
  unbroken = "zy" * 40_000 + "日本語" * 30_000
  alone = data.train_pieces(short, tmp_path / "a.model", size=268)
  mixed = data.train_pieces([*short, long], tmp_path / "b.model", size=276)
  assert len(alone.encode(" zebra")) == 6 and len(mixed.encode(" zebra")) == 1
  mixed = data.train_pieces([*short, unbroken], tmp_path / "c.model", size=280)
  assert len(mixed.encode("zyzyzyzy")) < 8 and len(mixed.encode("日本語")) < 9


def test_lines_with_a_reserved_character_are_used(tmp_path):
  lines = ["It was so."] * 9
  without = train([*lines, " zebra zebra"], tmp_path, 276)
  assert train([*lines, "▅ zebra▅ zebra"], tmp_path, 276) == without
  assert train(lines, tmp_path, 268) != train([*lines, "▅oooo"], tmp_path, 268)


def test_lines_may_be_bytes(tmp_path):
  lines = ["naïve zebra"] * 9
  assert train(lines, tmp_path, 272) == train([line.encode() for line in lines], tmp_path, 272)


@pytest.mark.parametrize(
  "lines, message",
  [("It was so.", "be an iterable of texts, not one text"), ([None], "hold texts, got NoneType")],
)
def test_lines_that_are_not_texts_are_refused(lines, message, tmp_path):
  with pytest.raises(TypeError, match=f"train_pieces: lines must {message}"):
    data.train_pieces(lines, tmp_path / "a.model", size=300)


def test_a_vocabulary_is_read_from_its_file(vocabulary, capsys):
  read = data.PieceVocabulary(vocabulary.file)
  assert read.fingerprint == vocabulary.fingerprint
  np.testing.assert_array_equal(read.encode("Highbury"), vocabulary.encode("Highbury"))
  assert not capsys.readouterr().err


def test_bad_files_sizes_and_tokens_are_named(vocabulary, tmp_path):
  (tmp_path / "text.model").write_text("not a model")
  with pytest.raises(ValueError, match=r"text\.model is not a SentencePiece model"):
    data.PieceVocabulary(tmp_path / "text.model")
  with pytest.raises(FileNotFoundError):
    data.PieceVocabulary(tmp_path / "missing.model")
  with pytest.raises(ValueError, match=r"n_vocab=401, not the 400 of .*a\.model: set n_vocab=400"):
    vocabulary.check("config.n_vocab", 401)
  with pytest.raises(ValueError, match=r"\[0, 400\), got 400...400"):
    vocabulary.decode([400])


def test_a_model_with_different_special_tokens(tmp_path):
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["It was so."] * 9),
    model_prefix=str(tmp_path / "other"),
    vocab_size=12,
    model_type="bpe",
    minloglevel=2,
  )
  message = r"other\.model: the ids of pad, eos, unk and bos are \(-1, 2, 0, 1\), but must be \(0, "
  with pytest.raises(ValueError, match=message):
    data.PieceVocabulary(tmp_path / "other.model")


def test_a_lossy_vocabulary_is_logged_once(tmp_path, capsys):
  train_lossy(tmp_path / "lossy")
  vocabulary = data.PieceVocabulary(tmp_path / "lossy.model")
  assert vocabulary.decode(vocabulary.encode("so,  it\nwas")) == b" so, it was"
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 1 and lines[0].startswith(f"warning: {tmp_path}/lossy.model loses text (")


def test_a_launched_command_logs_a_lossy_vocabulary_once(workspace):
  train_lossy(workspace / "lossy")
  toy_datasets.write_text(workspace / "data", n_byte=3000)
  status, out, err = run(
    "python -m experiments.text --command=info --size=cpu --data_dir=data --workdir=new "
    "--cache_dir=cache --vocab=lossy.model --config.n_vocab=300",
    workspace,
  )
  assert status == 0 and "tokens" in out, err
  assert err.count("warning: lossy.model loses text") == err.count("warning") == 1, err


def test_exceptions_of_the_lines_are_raised(tmp_path):
  def lines():
    yield "a good line"
    raise ValueError("2.txt is not UTF-8")

  with pytest.raises(ValueError, match=r"^2\.txt is not UTF-8$"):
    data.train_pieces(lines(), tmp_path / "a.model", size=400)


@pytest.mark.parametrize(
  "lines, reason",
  [
    ([], ": the text is empty"),
    (["", "▅"], ": the text is empty"),
    (["a b"], r" on this text: .*too high \(400\)"),
  ],
)
def test_too_little_text_for_a_vocabulary(lines, reason, tmp_path):
  with pytest.raises(ValueError, match=f"cannot train a vocabulary of 400 tokens{reason}"):
    data.train_pieces(lines, tmp_path / "a.model", size=400)
  assert not list(tmp_path.iterdir())
