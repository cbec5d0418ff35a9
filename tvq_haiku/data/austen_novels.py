"""Six novels by Jane Austen, embedded: English text for tests, smoke runs and the quickstart."""

from __future__ import annotations

import importlib.resources
import io
import tarfile

HELD_OUT = "Persuasion"  # the title that the quickstart evaluates on


def austen() -> dict[str, bytes]:
  """Returns the text of each of the six novels by title, 4,025,029 bytes in total.

  The novels are in the public domain.

  >>> sorted(austen())[:2]
  ['Emma', 'Mansfield Park']
  """
  compressed = importlib.resources.files("tvq_haiku.data").joinpath("austen.tar.xz").read_bytes()
  novels = {}
  with tarfile.open(fileobj=io.BytesIO(compressed), mode="r:xz") as archive:
    for member in archive:
      if member.isfile():
        title = member.name.rsplit("austen_", 1)[1].removesuffix(".txt").replace("_", " ")
        novels[title] = archive.extractfile(member).read()
  return novels
