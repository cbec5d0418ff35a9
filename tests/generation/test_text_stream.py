"""Tests of decoding tokens to chunks of text."""

import pytest

from tvq_haiku import data
from tvq_haiku.generation.text_stream import TextStream

BYTES = data.ByteVocabulary
TEXT = "Käse 🧀 und Brot ☃, END"


def chunks_of(stream, vocabulary, text, n):
  """Reads the tokens of a text, n at a time; returns the chunks and the number of tokens read."""
  tokens, chunks, n_read = vocabulary.encode(text), [], 0
  for start in range(0, len(tokens), n):
    n_read += stream.read(tokens[start : start + n])
    chunks.append(stream.take())
    if stream.is_stopped:
      break
  return chunks, n_read


@pytest.fixture(params=["bytes", "pieces"])
def vocabulary(request):
  return BYTES if request.param == "bytes" else request.getfixturevalue("pieces")


@pytest.mark.parametrize("n", [1, 3, 100])
def test_chunks_add_up_to_the_text_and_no_character_is_split(vocabulary, n):
  stream = TextStream(vocabulary, [])
  chunks, n_read = chunks_of(stream, vocabulary, TEXT, n)
  assert "".join(chunks) == TEXT and n_read == len(vocabulary.encode(TEXT))
  assert stream.pending == b"" and not stream.is_stopped


@pytest.mark.parametrize("n", [1, 3, 100])
def test_a_stop_text_is_found_across_chunks_and_tokens(vocabulary, n):
  stream = TextStream(vocabulary, ["☃, E".encode(), b"Brx"])
  chunks, n_read = chunks_of(stream, vocabulary, TEXT, n)
  assert "".join(chunks) == "Käse 🧀 und Brot " and stream.is_stopped
  read = vocabulary.decode(vocabulary.encode(TEXT)[:n_read])
  shorter = vocabulary.decode(vocabulary.encode(TEXT)[: n_read - 1])
  assert "☃, E".encode() in read and "☃, E".encode() not in shorter


def test_bytes_of_a_cut_character_are_pending_until_the_text_ends():
  raw = "日本".encode()
  stream = TextStream(BYTES, [])
  stream.read(BYTES.encode(raw[:5]))
  stream.release(is_end=False)
  assert stream.take() == "日" and stream.pending == raw[3:5]
  next_stream = TextStream(BYTES, [], pending=stream.pending)
  next_stream.read(BYTES.encode(raw[5:]))
  assert next_stream.take() == "本" and next_stream.pending == b""
  stream.release(is_end=True)
  assert stream.take() == "\ufffd" and stream.pending == b""


def test_the_beginning_of_a_stop_text_is_held_back_and_released():
  stream = TextStream(BYTES, [b"END"])
  stream.read(BYTES.encode("the EN"))
  assert (stream.take(), stream.pending) == ("the ", b"EN")
  stream.release(is_end=False)
  assert (stream.take(), stream.pending) == ("EN", b"")


def test_stop_texts_are_not_searched_in_pending_bytes():
  stream = TextStream(BYTES, [b"\xa4s"], pending=b"\xc3")
  stream.read(BYTES.encode(b"\xa4"))
  stream.read(BYTES.encode(b"s"))
  assert stream.is_stopped and stream.take() == ""
  stream = TextStream(BYTES, [b"ab"], pending=b"a")
  stream.read(BYTES.encode(b"b"))
  assert not stream.is_stopped and stream.take() == "ab"


def test_bytes_that_are_not_utf8_become_replacement_characters():
  stream = TextStream(BYTES, [])
  stream.read(BYTES.encode(b"a\xff\xc3b"))
  assert stream.take() == "a\ufffd\ufffdb"
