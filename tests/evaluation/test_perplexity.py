"""Perplexity against NumPy's on the model's logits."""

import math

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax import stack
from tests import tiny

ROWS = tiny.tokens(5, 9)


@pytest.fixture(scope="module")
def model():
  return tiny.model("0:1", num_layers=2)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


def test_against_numpy(model, params):
  logits = np.asarray(jax.jit(model.apply)({"params": params}, ROWS), np.float64)[:, :-1]
  log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  loss = -np.take_along_axis(log_probs, ROWS[:, 1:, None], axis=-1).mean()
  found = sa_jax.perplexity(model, params, ROWS, batch_size=2)
  assert found.tokens == 5 * 8
  assert found.loss == pytest.approx(loss, rel=1e-6)
  assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-6)


def test_batches_and_layouts_do_not_matter(model, params):
  progress = []
  first = sa_jax.perplexity(model, params, ROWS, batch_size=2, progress=lambda *step: progress.append(step))
  second = sa_jax.perplexity(model, stack(params, model.plan), ROWS, batch_size=5)
  assert first.loss == pytest.approx(second.loss, rel=1e-6)
  assert progress == [(2, 5), (4, 5), (5, 5)]


def test_uniform_model(model, params):
  """A head of zeros gives every token the same probability."""
  flat = params | {"lm_head": {"kernel": np.zeros_like(params["lm_head"]["kernel"])}}
  assert sa_jax.perplexity(model, flat, ROWS).perplexity == pytest.approx(61, rel=1e-5)


def test_rows_of():
  assert sa_jax.rows_of(range(10), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
  assert sa_jax.rows_of(range(10), 3, rows=2).tolist() == [[0, 1, 2], [3, 4, 5]]
  assert sa_jax.rows_of(range(10), 4, start=99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
  assert sa_jax.rows_of(range(4), 4, start=[98, 99]).tolist() == [[98, 99, 0, 1], [98, 99, 2, 3]]
  assert sa_jax.rows_of(range(4), 2, start=()).tolist() == sa_jax.rows_of(range(4), 2).tolist()
  with pytest.raises(ValueError, match="no room for text after 2 start tokens"):
    sa_jax.rows_of(range(4), 2, start=[98, 99])
  with pytest.raises(
    ValueError, match=r"5 tokens, too few for 2 rows of 3 tokens; use a longer text, or a `length` of at most 3, or"
  ):
    sa_jax.rows_of(range(5), 4, 2, start=99)
  with pytest.raises(
    ValueError, match=r"too few for 4 rows of 3 tokens; .*a `length` of at most 2, or at most 3 rows \(`rows`\)$"
  ):
    sa_jax.rows_of(range(10), 3, rows=4)
  with pytest.raises(ValueError, match="too few for 1 row of 3 tokens; use a longer text, or a `length` of at most 2$"):
    sa_jax.rows_of(range(2), 3)
  with pytest.raises(ValueError, match="rows need at least 2 tokens"):
    sa_jax.rows_of(range(10), 1)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([[1, 61]], "token 61 is outside the vocabulary"),
    ([1, 2], "tokens must be integers of shape"),
    ([[1], [2]], "rows need at least 2 tokens"),
    (np.zeros((0, 4), np.int32), "at least one row"),
    ([[1.5, 2.5]], "tokens must be integers"),
  ],
)
def test_refused(model, params, rows, message):
  with pytest.raises(ValueError, match=message):
    sa_jax.perplexity(model, params, rows)


def test_a_loss_beyond_float64_is_an_infinite_perplexity(model, params):
  head = {"kernel": 1e6 * params["lm_head"]["kernel"]}
  found = sa_jax.perplexity(model, params | {"lm_head": head}, ROWS)
  assert found.loss > 710
  assert found.perplexity == math.inf


def test_rare_words_are_unknown():
  text = " a b a \n a b , c\n"
  assert sa_jax.evaluation.rare_words_unknown(text, 2) == " a b a \n a b <unk> <unk>\n"
  assert sa_jax.evaluation.rare_words_unknown(text) == " a <unk> a \n a <unk> <unk> <unk>\n"
