"""The README's examples run, and print what it says; its tables are what the experiments measured."""

import doctest
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.real_model
def test_examples_print_what_the_readme_says(smollm2, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  example = doctest.DocTestParser().get_doctest(text.replace("```", ""), {"path": smollm2}, "README.md", None, 0)
  assert len(example.examples) > 15
  report: list[str] = []
  result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
  assert result.failed == 0, "".join(report)


def test_tables_are_what_the_files_of_the_experiments_hold():
  spec = importlib.util.spec_from_file_location("quality", ROOT / "experiments" / "quality.py")
  quality = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = quality  # dataclasses look their module up
  spec.loader.exec_module(quality)
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  assert text == quality.with_tables(text), "run experiments/quality.py"
  eight = next(row for row in quality.rows_of(quality.CARDS["smollm2-135m-instruct"]) if row.followers == 8)
  assert f"| SmolLM2-135M-Instruct | 8 of 30 | 13% | {quality.times(eight.refitted)} |" in text
  assert 1 < max(eight.refitted) < 1.1
