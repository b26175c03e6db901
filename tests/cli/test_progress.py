"""How far work is, in a terminal and through a pipe."""

import io
import re

import pytest
from rich.console import Console

from sa_jax.cli import progress as module
from sa_jax.cli.progress import progress, stages


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass when the test says so."""
  now = [0.0]
  monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
  return now


def test_through_a_pipe_there_is_a_line_now_and_then(clock, capsys):
  with progress("reading") as report:
    for done in range(1, 11):
      clock[0] += 30 if done == 1 else 8  # the first has a compilation in it
      report(done, 10)
  lines = capsys.readouterr().err.splitlines()
  assert lines == ["reading: 1/10", "reading: 4/10, 48 s left", "reading: 7/10, 24 s left", "reading: done in 2 min"]


def test_work_that_begins_anew_is_told_without_time_left(clock, capsys):
  with progress("scoring") as report:
    for done in (2, 3, 1, 2, 3):
      clock[0] += 30
      report(done, 4)
  lines = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
  assert lines == [
    "scoring: 2/4",
    "scoring: 3/4",
    "scoring: 1/4",
    "scoring: 2/4",
    "scoring: 3/4",
    "scoring: done in 2 min",
  ]


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_a_terminal_without_cursor_has_no_bar(monkeypatch, capsys, terminal):
  screen = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": terminal})
  monkeypatch.setattr(module, "console", screen)
  with progress("reading") as report:
    report(1, 2)
  assert bool(screen.file.getvalue()) == (terminal == "xterm")
  assert capsys.readouterr() == ("", "")


def test_what_is_soon_done_names_only_the_first_stage_at_once(clock, capsys):
  with stages() as stage:
    for name in ("one", "two"):
      report = stage(name)
      clock[0] += 9
      report(1, 2)
      report(2, 2)
      assert capsys.readouterr() == ("", "one: compiling first\n" if name == "one" else "")


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_fits_into_a_terminal_and_never_counts_to_an_unknown_number(monkeypatch, width):
  screen = Console(file=io.StringIO(), force_terminal=True, width=width, legacy_windows=False)
  monkeypatch.setattr(module, "console", screen)
  now = [0.0]
  screen.get_time = lambda: now[0]
  with progress("a very long name of work, of 1:2-3,4:5-6,7:8-9") as report:
    now[0] = 7
    report(0, 300)
    for done in (100, 200):
      now[0] += 50
      report(done, 300)
  shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
  frames = [frame for frame in re.split(r"[\r\n]+", shown) if frame.strip()]
  assert max(map(len, frames)) <= width
  assert "?" not in shown
  assert "200/300" in shown
