"""What holds for the whole process of a command, set once, before JAX starts."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_TRITON = "--xla_gpu_enable_triton_gemm"


def own(*, exact: bool) -> None:
  """Settings of a process that is the command's alone; what the user has set stands.

  Args:
    exact: whether products are in exact float32.
  """
  # So that what is being written is removed, and finished parts stay: the default would end the process where it is.
  signal.signal(signal.SIGTERM, _terminated)
  # With XLA's Triton products, exact ones are tuned for minutes: `share` was unfinished on a GPU after 170 s; without,
  # it takes 46 (BUILD.md). Heeded only while JAX has not begun.
  flags = os.environ.get("XLA_FLAGS", "")
  if exact and _TRITON not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_TRITON}=false".strip()


def _terminated(number: int, frame: FrameType | None) -> None:
  del frame
  sys.exit(128 + number)
