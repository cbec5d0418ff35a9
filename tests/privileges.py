"""What root may not do, once it has laid down its privileges."""

import contextlib
import ctypes
import os

_VERSION = 0x20080522
_OVERRIDES = (1 << 1) | (
  1 << 2
)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: reading what is forbidden


class _Header(ctypes.Structure):
  _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
  _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextlib.contextmanager
def none():
  """Permissions of files count for this thread, even if it is root's."""
  if os.geteuid() != 0:
    yield
    return
  libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(_VERSION, 0), (_Sets * 2)()
  assert libc.capget(ctypes.byref(header), sets) == 0, os.strerror(ctypes.get_errno())
  before = sets[0].effective
  sets[0].effective &= ~_OVERRIDES
  assert libc.capset(ctypes.byref(header), sets) == 0, os.strerror(ctypes.get_errno())
  try:
    yield
  finally:
    sets[0].effective = before
    assert libc.capset(ctypes.byref(header), sets) == 0
