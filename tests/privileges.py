"""Runs code without the capability of root to ignore file permissions."""

import contextlib
import ctypes
import os

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3 of capget(2)
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_OVERRIDES = (1 << _CAP_DAC_OVERRIDE) | (1 << _CAP_DAC_READ_SEARCH)


class _Header(ctypes.Structure):
  """`cap_user_header_t`."""

  _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
  """`cap_user_data_t`."""

  _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextlib.contextmanager
def dropped():
  """Makes file permissions apply to this thread even if it runs as root."""
  if os.geteuid() != 0:
    yield
    return
  libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(_VERSION, 0), (_Sets * 2)()
  _check(libc.capget(ctypes.byref(header), sets))
  effective = sets[0].effective
  sets[0].effective &= ~_OVERRIDES
  _check(libc.capset(ctypes.byref(header), sets))
  try:
    yield
  finally:
    sets[0].effective = effective
    _check(libc.capset(ctypes.byref(header), sets))


def _check(status):
  """Raises an OSError unless a system call returned 0."""
  if status != 0:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
