"""Printing characters that the encoding of standard output lacks."""

import io
import sys

import pytest

from experiments import console


@pytest.fixture
def stdout(monkeypatch):
  """Returns a function that replaces standard output by one of a given encoding."""

  def replace(encoding, errors="strict"):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding, errors))
    console.replace_unprintable("sample")
    return sys.stdout

  return replace


def printed(stdout, *texts):
  """Prints texts one after the other, as a command that streams does; returns the bytes."""
  for text in texts:
    print(text, end="", flush=True)
  return stdout.buffer.getvalue()


@pytest.mark.parametrize(
  "encoding, expected",
  [
    ("ascii", b"a?? ?b?"),
    ("latin-1", "a?? ?bé".encode("latin-1")),
    ("cp1252", "a?? €bé".encode("cp1252")),
    ("shift-jis", "a日本 ?b?".encode("shift-jis")),
    ("utf-8", "a日本 €bé".encode()),
  ],
)
def test_only_missing_characters_are_replaced(stdout, encoding, expected):
  assert printed(stdout(encoding), "a日本 ", "€bé") == expected


def test_replacement_is_reported_once_with_the_remedy(stdout, capsys, monkeypatch):
  monkeypatch.delenv("PYTHONIOENCODING", raising=False)
  printed(stdout("ascii"), "a", "日", "本", "語")
  line = (
    "sample: standard output is encoded in ascii, which lacks some characters: each is printed "
  )
  assert capsys.readouterr().err == line + "as '?'. To print them, set PYTHONUTF8=1.\n"
  monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # has priority over PYTHONUTF8
  printed(stdout("ascii"), "日")
  assert capsys.readouterr().err.endswith("set PYTHONUTF8=1 and unset PYTHONIOENCODING.\n")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_bytes_of_file_names_are_printed_unchanged(stdout, capsys, encoding):
  name = b"runs/\xff".decode(errors="surrogateescape")
  assert printed(stdout(encoding), name) == b"runs/\xff"
  assert not capsys.readouterr().err


def test_chosen_treatment_stays(stdout, capsys):
  assert printed(stdout("ascii", "backslashreplace"), "日") == b"\\u65e5"
  assert not capsys.readouterr().err
