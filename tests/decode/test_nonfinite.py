"""Logits that are not finite are told once: the row, and its first token that was drawn of them."""

import numpy as np
import pytest

import sa_jax
from sa_jax.decode import Draft, Settings, right_pad, speculate
from tests import tiny

PROMPTS, NEW = [[5, 9, 3], [11, 2]], 8


@pytest.fixture(scope="module")
def model():
  return tiny.model("0:1", num_layers=3)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


GENERATORS = {
  "generate": lambda model, params: sa_jax.generate(model, params, *right_pad(PROMPTS), max_new_tokens=NEW),
  "speculate": lambda model, params: speculate(
    model, params, Draft.early_exit(model, params, 2), *right_pad(PROMPTS), Settings(NEW)
  ),
}


@pytest.mark.parametrize(("kind", "read"), [("generate", "prompt"), ("generate", "new"), ("speculate", "prompt")])
def test_told_once(model, params, caplog, kind, read):
  """By the damaged embedding of a token that one row alone reads: its prompt's last, or the first that is its own."""
  rows = GENERATORS["generate"](model, params).tokens.tolist()
  others = {*PROMPTS[0], *PROMPTS[1], *rows[0], rows[1][0]}
  at = -1 if read == "prompt" else next(at for at, token in enumerate(rows[1]) if token not in others)
  token = PROMPTS[1][-1] if read == "prompt" else rows[1][at]
  embedding = np.array(params["embed"]["embedding"])
  embedding[token] = np.nan
  GENERATORS[kind](model, {**params, "embed": {"embedding": embedding}})
  warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
  assert len(warnings) == 1
  assert f"the logits of row 1 are NaN or infinite from its new token {at + 2} on:" in warnings[0]
