"""Standard output that can print any text, whatever its encoding is."""

from __future__ import annotations

import codecs
import io
import os
import sys

_ERROR_HANDLER = "tvq_haiku.replace"


def replace_unprintable(name: str) -> None:
  """Makes standard output print characters that its encoding lacks as question marks.

  At the first such character, one line on standard error says how to print all of them. Bytes of a
  file name that are not UTF-8 are printed unchanged. If the user has chosen a different treatment,
  such as PYTHONIOENCODING=ascii:backslashreplace, it stays.

  Args:
    name: name of the command, for the message.
  """
  output = sys.stdout
  if isinstance(output, io.TextIOWrapper) and output.errors in ("strict", "surrogateescape"):
    codecs.register_error(_ERROR_HANDLER, _Replacement(name, output.encoding))
    output.reconfigure(errors=_ERROR_HANDLER)


class _Replacement:
  """An error handler of `codecs`: replaces the characters that cannot be encoded."""

  def __init__(self, name: str, encoding: str):
    self._name, self._encoding = name, encoding
    self._is_reported = False

  def __call__(self, error: UnicodeError) -> tuple[str | bytes, int]:
    """Returns the replacement of the first such character, and the position after it."""
    if not isinstance(error, UnicodeEncodeError):
      raise error
    character, end = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":  # stands for a byte that is not UTF-8
      return bytes([ord(character) - 0xDC00]), end
    self._report()
    return "?", end

  def _report(self) -> None:
    if self._is_reported:
      return
    self._is_reported = True
    unset = " and unset PYTHONIOENCODING" if "PYTHONIOENCODING" in os.environ else ""
    print(
      f"{self._name}: standard output is encoded in {self._encoding}, which lacks some characters: "
      f"each is printed as '?'. To print them, set PYTHONUTF8=1{unset}.",
      file=sys.stderr,
      flush=True,
    )
