"""Six novels by Jane Austen, embedded: real English for tests, smoke runs and the quickstart."""

from __future__ import annotations

import importlib.resources
import io
import tarfile

HELD_OUT = "Persuasion"


def austen() -> dict[str, bytes]:
  """Title -> text of the six novels (public domain), 4,025,029 bytes in all.

  >>> sorted(austen())[:2]
  ['Emma', 'Mansfield Park']
  """
  packed = importlib.resources.files("tvq_haiku.data").joinpath("austen.tar.xz").read_bytes()
  novels = {}
  with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
    for member in archive:
      if member.isfile():
        title = member.name.rsplit("austen_", 1)[1].removesuffix(".txt").replace("_", " ")
        novels[title] = archive.extractfile(member).read()
  return novels
