"""Stop requests: a scheduler's SIGTERM or the user's Ctrl-C, on any host, or a time limit."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import jax
import numpy as np

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
  """Turns the first SIGTERM or SIGINT into a stop request, checked between steps; the second acts as usual."""

  def __init__(self, minutes: float | None = None) -> None:
    """Starts the clock.

    Args:
      minutes: time limit, after which a stop is also requested.
    """
    self._requested = False
    self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
    self._before: dict[signal.Signals, Any] = {}

  def __enter__(self) -> Self:
    # With several hosts, JAX handles SIGTERM and makes all of them stop at the same step.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._request) for number in _SIGNALS}
    return self

  def __exit__(self, *error: object) -> None:
    self._restore()

  def requested(self, step: int) -> bool:
    """Whether to stop after this step; the same answer on every host."""
    late = self._deadline is not None and time.monotonic() > self._deadline
    if jax.process_count() == 1:
      return self._requested or late
    from jax.experimental import multihost_utils

    if self._deadline is not None:  # clocks differ, so the first host decides
      late = bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))
    return late or multihost_utils.reached_preemption_sync_point(step)

  def _request(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._requested = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}
