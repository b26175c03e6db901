"""Properties of the host machine."""

from __future__ import annotations

import os


def memory() -> int | None:
  """The host's physical memory in bytes; None if the system does not report it."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
