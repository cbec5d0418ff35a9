"""A model with its vocabulary: its methods agree with the functions, and `load` inverts `save`."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvq_haiku as tvq
from tvq_haiku import data

import helpers

pytestmark = pytest.mark.slow

BYTE_CONFIG = tvq.TransformerConfig.tiny(n_layer=1)
ANY_BYTES = bytes(range(256)) + "Emma 🧀 went ▁ to Bath.\n".encode() + b"\xf0\x9f"


@pytest.fixture(params=["bytes", "pieces"], scope="module")
def lm(request):
  """A model of bytes, and one of pieces."""
  vocabulary = None if request.param == "bytes" else request.getfixturevalue("pieces")
  n_vocab = vocabulary.size if vocabulary else 259
  config = BYTE_CONFIG.replace(n_vocab=n_vocab, e_scale=0.1)
  return tvq.LanguageModel(helpers.random_params(config), config, vocabulary=vocabulary)


def test_the_default_vocabulary_is_that_of_bytes(lm):
  if lm.config.n_vocab == 259:
    assert lm.vocabulary is data.ByteVocabulary and "vocabulary=bytes" in repr(lm)
  else:
    assert isinstance(lm.vocabulary, data.PieceVocabulary) and "vocabulary=pieces-" in repr(lm)


def test_generate_takes_one_text_or_several(lm):
  settings = dict(max_new_tokens=12, temperature=0.8, top_k=50)
  texts = lm.generate(["Emma ", b"K\xc3", ""], **settings)
  assert texts == lm.generate(["Emma ", b"K\xc3", ""], rng=jax.random.key(0), **settings)
  assert lm.generate("Emma ", **settings) == texts[0] != lm.generate("Anne ", **settings)
  assert lm.generate(np.array(["Emma "]), **settings) == texts[:1]
  assert lm.generate("Emma ", rng=jax.random.key(1), **settings) != texts[0]


@pytest.mark.parametrize("prompt", ["Emma ", b"K\xc3", ""])
def test_stream_yields_the_text_of_generate(lm, prompt):
  settings = dict(max_new_tokens=40, top_p=0.9)
  text = lm.generate(prompt, **settings)
  assert "".join(lm.stream(prompt, **settings)) == text
  stop = next(text[i : i + 2] for i in range(3, 39) if text[i : i + 2].isascii())
  expected = lm.generate(prompt, stop=[stop], **settings)
  assert expected == text[: text.find(stop)]
  assert "".join(lm.stream(prompt, stop=[stop], **settings)) == expected


def test_a_conversation_keeps_its_state(lm):
  talk = lm.conversation(temperature=0.0)
  first = "".join(talk.write("Emma ", max_new_tokens=9)) + talk.pending.decode(errors="replace")
  assert first == lm.generate("Emma ", max_new_tokens=9, temperature=0.0)
  assert int(talk.state.position[0]) == 1 + len(lm.vocabulary.encode("Emma ")) + 9


def test_scores_are_those_of_one_forward_pass(lm):
  texts = ["Emma went to Bath.", "", "🧀"]
  scores = lm.score(texts, batch_size=2)
  assert scores.n_byte.tolist() == [18, 0, 4]
  for text, logprob, n_token in zip(texts, scores.logprobs, scores.n_token, strict=True):
    tokens = np.array([[1, *lm.vocabulary.encode(text), 1]])
    padded = np.zeros((1, 20), np.int32)
    padded[:, : tokens.shape[1]] = tokens
    logprobs = helpers.apply(lm.params, lm.config, padded).logprobs[0]
    expected = jnp.sum(logprobs[np.arange(tokens.shape[1] - 1), tokens[0, 1:]])
    np.testing.assert_allclose(logprob, expected, rtol=1e-5)
    assert n_token == tokens.shape[1] - 1


@pytest.mark.parametrize("rows", [1, 3])
def test_any_bytes_are_restored_from_their_compressed_form(lm, rows):
  packed = lm.compress(ANY_BYTES, rows=rows)
  assert lm.decompress(packed) == ANY_BYTES
  assert lm.compress(bytearray(ANY_BYTES), rows=rows) == packed


class Utf8Vocabulary(data.ByteVocabulary):
  """A vocabulary that encodes texts, but not arbitrary bytes."""

  @classmethod
  def encode(cls, text):
    return super().encode(text if isinstance(text, str) else text.decode())


def test_texts_that_the_vocabulary_cannot_encode_are_named():
  params = helpers.random_params(BYTE_CONFIG)
  lm = tvq.LanguageModel(params, BYTE_CONFIG, vocabulary=Utf8Vocabulary)
  with pytest.raises(ValueError, match=r"score: texts\[1\] is not UTF-8, .*no tokens of bytes"):
    lm.score(["Emma", b"\xff"])
  with pytest.raises(ValueError, match=r"continue_text: prompts\[0\] is not UTF-8"):
    lm.generate(b"\xff", max_new_tokens=1)
  with pytest.raises(ValueError, match=r"Conversation: prompt is not UTF-8"):
    lm.stream(b"\xff", max_new_tokens=1)
  with pytest.raises(ValueError, match="does not restore these data"):
    lm.compress(b"\xff")
  settings = dict(max_new_tokens=9, stop=[b"\xff"])  # a part of a text that need not be UTF-8
  assert "".join(lm.stream("Emma ", **settings)) == lm.generate("Emma ", **settings)


def test_load_reads_what_save_wrote(lm, tmp_path):
  lm.save(tmp_path / "new" / "model")
  for path in (tmp_path / "new" / "model", tmp_path / "new" / "model" / "params.safetensors"):
    loaded = tvq.load(path)
    helpers.assert_same(loaded.params, lm.params)
    assert loaded.config == lm.config
    assert loaded.vocabulary.fingerprint == lm.vocabulary.fingerprint
  files = ["params.safetensors"] + ["vocab.model"] * (lm.vocabulary is not data.ByteVocabulary)
  assert sorted(os.listdir(tmp_path / "new" / "model")) == files


def test_save_does_not_touch_a_directory_with_files(tmp_path):
  lm = tvq.LanguageModel(helpers.random_params(BYTE_CONFIG), BYTE_CONFIG)
  (tmp_path / "file").write_text("text")
  for path in (tmp_path, tmp_path / "file"):
    with pytest.raises(FileExistsError, match=f"{path} exists already: name a new directory"):
      lm.save(path)
  assert os.listdir(tmp_path) == ["file"]
  (tmp_path / "empty").mkdir()
  lm.save(tmp_path / "empty")
  assert tvq.load(tmp_path / "empty").config == BYTE_CONFIG


def test_a_vocabulary_of_another_class_cannot_be_saved(tmp_path):
  class Upper(data.ByteVocabulary):
    """A vocabulary of the same size."""

  lm = tvq.LanguageModel(helpers.random_params(BYTE_CONFIG), BYTE_CONFIG, vocabulary=Upper)
  with pytest.raises(ValueError, match=r"save: vocabulary=.* cannot be saved"):
    lm.save(tmp_path / "model")
  assert os.listdir(tmp_path) == []


@pytest.fixture
def run(tmp_path):
  """The directory of a training run whose best checkpoint is older than the last one."""
  for directory, step in ((tmp_path, 4), (tmp_path / "best", 2)):
    tvq.save_checkpoint(directory, helpers.make_checkpoint(step))
  return tmp_path


@pytest.mark.parametrize("weights, step", [("best", 2), ("last", 4)])
def test_load_reads_a_run(run, weights, step):
  loaded = tvq.load(run, weights=weights)
  helpers.assert_same(loaded.params, helpers.make_checkpoint(step).train_state.params)
  assert loaded.config == helpers.RUN


def test_an_exported_file_does_not_replace_the_checkpoints_of_a_run(run):
  tvq.export_params(helpers.random_params(BYTE_CONFIG), BYTE_CONFIG, run / "params.safetensors")
  assert tvq.load(run).config == helpers.RUN
  assert tvq.load(run / "params.safetensors").config == BYTE_CONFIG


def test_load_reads_the_vocabulary_of_a_run(run, pieces, tmp_path):
  (run / "vocab.model").write_bytes(pieces.model)
  for path in (run, run / "best"):
    with pytest.raises(
      ValueError, match=r"the model has n_vocab=259, not the 400 of .*vocab\.model"
    ):
      tvq.load(path)
    assert tvq.load(path, vocabulary=data.ByteVocabulary).config == helpers.RUN


def test_the_missing_vocabulary_of_a_model_is_named(tmp_path, pieces):
  config = BYTE_CONFIG.replace(n_vocab=pieces.size)
  tvq.export_params(helpers.random_params(config), config, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"n_vocab=400, not the 259 .* pass .* vocabulary=tvq_haiku"):
    tvq.load(tmp_path / "model.safetensors")
  assert tvq.load(tmp_path / "model.safetensors", vocabulary=pieces).config == config


def test_what_holds_no_model_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"load: .*missing does not exist. Pass the directory of a"):
    tvq.load(tmp_path / "missing")
  with pytest.raises(tvq.CheckpointError, match=r"holds no checkpoint: config.json is missing"):
    tvq.load(tmp_path)
  (tmp_path / "a.txt").write_text("text")
  with pytest.raises(TypeError, match=r"load: path must be a str or a pathlib.Path, got 5"):
    tvq.load(5)
  with pytest.raises(ValueError, match=r"a.txt does not hold the parameters of a model"):
    tvq.load(tmp_path / "a.txt")


def test_models_that_cannot_predict_text_are_refused():
  params = helpers.random_params(BYTE_CONFIG)
  encoder = BYTE_CONFIG.replace(causal=False)
  with pytest.raises(ValueError, match="LanguageModel: causal=False: an encoder cannot predict"):
    tvq.LanguageModel(params, encoder)
  with pytest.raises(ValueError, match="LanguageModel: no_emb=True: the model reads features"):
    tvq.LanguageModel(params, BYTE_CONFIG.replace(no_emb=True))
  with pytest.raises(ValueError, match="params do not fit this config"):
    tvq.LanguageModel(params, BYTE_CONFIG.replace(d_k=8))
  with pytest.raises(TypeError, match="LanguageModel: config must be a TransformerConfig"):
    tvq.LanguageModel(BYTE_CONFIG, params)
  with pytest.raises(TypeError, match=r"LanguageModel: vocabulary='vocab.model' must be"):
    tvq.LanguageModel(params, BYTE_CONFIG, vocabulary="vocab.model")
