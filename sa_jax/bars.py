"""A progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from sa_jax.durations import duration

_LABEL = 28


@contextlib.contextmanager
def bar(label: str, screen: Console) -> Iterator[Callable[[int, int], None]]:
  """Shows a bar on a terminal or in a notebook until the work ends."""
  name = TextColumn(f"{{task.description:<{_LABEL}}}", table_column=Column(no_wrap=True, overflow="ellipsis"))
  with Progress(name, BarColumn(bar_width=24), _Count(), _Time(), console=screen, transient=True) as bar:
    task = bar.add_task(label, total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)


class _Count(ProgressColumn):
  """Done and total, once known."""

  def render(self, task: Task) -> Text:
    return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Time(ProgressColumn):
  """Remaining time; elapsed time while that is unknown."""

  def render(self, task: Task) -> Text:
    left = task.time_remaining if task.total is not None else None
    return Text(duration(task.elapsed or 0) if left is None else f"{duration(left)} left", "cyan")
