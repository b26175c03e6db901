"""Progress: a bar in a terminal, otherwise occasional lines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from sa_jax.bars import bar
from sa_jax.cli.common import console, is_first
from sa_jax.display import Progress
from sa_jax.durations import duration

_SECONDS = 20.0
"""Seconds between lines; shorter work prints none."""


@contextlib.contextmanager
def progress(label: str) -> Iterator[Progress]:
  """Shows progress on the first process: on the terminal that tables go to, otherwise on stderr."""
  screen = console if console.is_interactive else Console(stderr=True)
  shown = _nothing if not is_first() else bar if screen.is_interactive else _lines
  with shown(label, screen) as report:
    yield report


@contextlib.contextmanager
def stages() -> Iterator[Callable[[str], Progress]]:
  """Consecutive stages of work: yields a function that starts a named stage and returns its reporter.

  Where there is no bar, the first stage is named at once, because compilation may take a while.
  """
  with contextlib.ExitStack() as current:
    named = not is_first() or console.is_interactive or Console(stderr=True).is_interactive

    def begin(name: str) -> Progress:
      nonlocal named
      if not named:
        print(f"{name}: compiling first", file=sys.stderr, flush=True)
      named = True
      current.close()
      return current.enter_context(progress(name))

    yield begin


@contextlib.contextmanager
def _nothing(label: str, screen: Console) -> Iterator[Progress]:
  del label, screen
  yield lambda done, total: None


@contextlib.contextmanager
def _lines(label: str, screen: Console) -> Iterator[Progress]:
  """Prints occasional lines, and the total time at the end if there were any."""
  del screen
  start = said = time.monotonic()
  first: tuple[float, int] | None = None

  def say(text: str) -> None:
    nonlocal said
    said = time.monotonic()
    print(f"{label}: {text}", file=sys.stderr, flush=True)

  def report(done: int, total: int) -> None:
    nonlocal first
    now = time.monotonic()
    if now - said >= _SECONDS and done < total:
      left = ""
      if first is not None and done > first[1]:
        left = f", {duration((now - first[0]) / (done - first[1]) * (total - done))} left"
      say(f"{done}/{total}{left}")
    # The first item includes compilation, so the remaining time is estimated from the later ones.
    if first is None and done:
      first = now, done

  yield report
  if said != start:
    say(f"done in {duration(time.monotonic() - start)}")
