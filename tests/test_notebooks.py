"""The notebooks: the cheapest runs here, all of them under ``make notebooks``; each becomes a page."""

import importlib.util
import re
import runpy
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


def test_a_model_of_the_blocks_learns_to_repeat():
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    names = runpy.run_path(str(ROOT / "docs" / "notebooks" / "4-blocks.py"))
  assert names["accuracy"] > 0.95  # a guess is right once in 16 times
  assert names["difference"] == 0


@pytest.fixture(scope="module")
def notebooks():
  """The module that makes pages of them."""
  pytest.importorskip("jupytext")
  spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "hooks" / "notebooks.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_a_notebook_is_a_page_with_one_title_and_its_code(notebooks, source):
  text, pictures = notebooks.page(source.stem, notebooks.jupytext.read(source))
  prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
  assert re.findall(r"^# (\d)\. ", prose, re.MULTILINE) == [source.stem[0]]
  code = "\n".join(re.findall(r"```\{ \.python \}\n(.*?)```", text, re.DOTALL))
  compile(code, source, "exec")
  assert "import sa_jax" in code
  assert not pictures  # none, before it has run


def test_what_a_notebook_prints_is_on_its_page(notebooks):
  made = notebooks.jupytext.reads('# %% [markdown]\n# # Title\n# %% alt="A dot"\n1\n', fmt="py:percent")
  outputs = [
    {"output_type": "stream", "name": "stdout", "text": "said\n"},
    {"output_type": "stream", "name": "stderr", "text": "not this"},
    {"output_type": "display_data", "data": {"image/png": "aGk=", "text/plain": "<Figure>"}},
    {"output_type": "execute_result", "data": {"text/html": "<b>1</b>", "text/plain": "1"}},
    {"output_type": "display_data", "data": {"text/html": "<pre></pre>", "text/plain": "\n"}},
    {"output_type": "display_data", "data": {notebooks.WIDGET: {}, "text/plain": "Output()"}},
  ]
  made.cells[1].outputs = [importlib.import_module("nbformat").from_dict(output) for output in outputs]
  text, pictures = notebooks.page("name", made)
  assert pictures == {"name-1.png": b"hi"}
  for part in ("said\n", "![A dot](name-1.png)", '<div class="output"><b>1</b></div>'):
    assert part in text
  assert "not this" not in text
  assert "Output()" not in text
  assert "<pre>" not in text
