"""The error for what a user did."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def near(name: str, known: Iterable[str]) -> str:
  """What an error adds about a name that is not known: the known ones that are spelt alike, if there are any."""
  spelt = {each.lower(): each for each in known}
  found = [spelt[each] for each in difflib.get_close_matches(name.lower(), spelt, 3)]
  return f"; did you mean {' or '.join(found)}?" if found else ""


def shown(value: object) -> str:
  """A value as an error tells it, cut where it is long."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:79]}…"


class UserError(ValueError):
  """Something that a user did and can mend; the text says what was wrong and what would be right.

  Everything that the library refuses on purpose is one of these, so that programs can tell it from a fault of the
  library's own. The command line prints it and exits with 2.
  """

  @classmethod
  def of(cls, subject: str, faults: Sequence[str]) -> UserError:
    """All faults of one thing: after its name if there is one, below it, one a line, if there are several."""
    return cls(f"{subject}: {faults[0]}" if len(faults) == 1 else "\n  ".join((f"{subject}:", *faults)))
