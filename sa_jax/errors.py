"""`UserError`: errors that the user can fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def near(name: str, known: Iterable[str]) -> str:
  """The suggestion for an unknown name: known names with a similar spelling, if any."""
  spelt = {each.lower(): each for each in known}
  found = [spelt[each] for each in difflib.get_close_matches(name.lower(), spelt, 3)]
  return f"; did you mean {' or '.join(found)}?" if found else ""


def shown(value: object) -> str:
  """A value for an error message, truncated if long."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:79]}…"


class UserError(ValueError):
  """An error that the user can fix. The message says what is wrong and what would be right.

  The library raises it for everything that it refuses on purpose, so programs can tell it from a bug. The command line
  prints it and exits with 2.
  """

  @classmethod
  def of(cls, subject: str, faults: Sequence[str]) -> UserError:
    """All errors of one subject: one after its name, several below it, one per line."""
    return cls(f"{subject}: {faults[0]}" if len(faults) == 1 else "\n  ".join((f"{subject}:", *faults)))
