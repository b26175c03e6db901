"""What this machine has."""

from __future__ import annotations

import os


def memory() -> int | None:
  """Bytes of its memory; None where the system does not say."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
