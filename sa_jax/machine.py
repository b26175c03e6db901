"""Properties of the host machine, and rates of devices."""

from __future__ import annotations

import os

PEAK_TFLOPS = {
  "NVIDIA A100": 312.0,
  "NVIDIA H100": 989.0,
  "NVIDIA H200": 989.0,
  "TPU v4": 275.0,
  "TPU v5 lite": 197.0,
  "TPU v5p": 459.0,
  "TPU v5": 459.0,
  "TPU v6 lite": 918.0,
}
"""Vendors' dense bfloat16 rates, by prefix of the device name."""


def memory() -> int | None:
  """The host's physical memory in bytes; None if the system does not report it."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
