"""The README's examples run, and print what it says."""

import doctest
from pathlib import Path

import pytest


@pytest.mark.real_model
def test_examples_print_what_the_readme_says(smollm2, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
  example = doctest.DocTestParser().get_doctest(text.replace("```", ""), {"path": smollm2}, "README.md", None, 0)
  assert len(example.examples) > 20
  report: list[str] = []
  result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
  assert result.failed == 0, "".join(report)
