"""Runs the examples of Markdown pages, ``python tests/pages.py PAGE …``; what they print is what the page says."""

import doctest
import sys
from pathlib import Path


def failures(page: Path, names: dict[str, object] | None = None) -> str:
  """What a page's examples do otherwise than it says; empty if nothing. Lines that are no examples are ignored."""
  text = page.read_text(encoding="utf-8")
  text = "\n".join("" if line.startswith("```") else line for line in text.splitlines())
  example = doctest.DocTestParser().get_doctest(text, dict(names or {}), page.name, str(page), 0)
  if not example.examples:
    return f"{page} has no examples"
  report: list[str] = []
  doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(example, out=report.append)
  return "".join(report)


if __name__ == "__main__":
  found = "".join(failures(Path(name)) for name in sys.argv[1:])
  print(found or "The examples print what the pages say.")
  sys.exit(bool(found))
