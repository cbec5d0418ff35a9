"""The embedded novels."""

from tvq_haiku import data
from tvq_haiku.data import austen_novels


def test_there_are_six_novels():
  novels = data.austen()
  assert len(novels) == 6 and austen_novels.HELD_OUT in novels
  assert sum(map(len, novels.values())) == 4_025_029
  assert b"universally acknowledged" in novels["Pride And Prejudice"]
