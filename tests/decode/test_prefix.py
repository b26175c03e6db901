"""What is read once: a beginning that prompts share, and a prompt that several rows continue."""

import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.decode import Batcher, PromptCache, Sampler, Serving, right_pad
from sa_jax.nn import Transformer
from tests import tiny

BEGINNING = [5, 9, 3, 7, 1, 1]
PROMPTS = [[5, 9, 3, 7, 1, 1, 8, 2], [5, 9, 3, 7, 1, 1], [5, 9, 4], [6]]
"""One goes on, one is all of the beginning, one leaves it, one has nothing of it."""


@pytest.fixture(scope="module")
def model():
  return tiny.model("0:1,2:3", num_layers=4)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


@pytest.mark.parametrize(("slots", "temperature"), [(64, 0.0), (2, 1.0)])
def test_a_beginning_changes_nothing(model, params, slots, temperature):
  prefix = PromptCache.read(model, params, BEGINNING)
  how = {"max_new_tokens": 5, "temperature": temperature, "slots": slots, "seed": 3}
  plain = sa_jax.generate(model, params, *right_pad(PROMPTS), **how)
  found = sa_jax.generate(model, params, *right_pad(PROMPTS), **how, prefix=prefix)
  np.testing.assert_array_equal(found.tokens, plain.tokens)


def test_only_what_differs_is_read(model, params, monkeypatch):
  prefix = PromptCache.read(model, params, BEGINNING * 20)
  read = []
  plain = Transformer.extend
  seen = lambda self, tokens, cache, rows: read.append(tokens.shape) or plain(self, tokens, cache, rows)
  monkeypatch.setattr(Transformer, "extend", seen)
  prompt = np.array([BEGINNING * 20 + [4, 4]])
  out = sa_jax.generate(model, params, prompt, max_new_tokens=1, prefix=prefix)
  assert read == [(1, 64)]  # of 122 tokens, the shortest that rows are padded to
  monkeypatch.undo()
  np.testing.assert_array_equal(out.tokens, sa_jax.generate(model, params, prompt, max_new_tokens=1).tokens)


def test_a_beginning_that_depends_on_the_length_is_refused():
  rope = ops.RopeConfig(scaling="dynamic", factor=2.0, original_max_length=8)
  model = tiny.model("0:1", num_layers=2, rope=rope)
  with pytest.raises(sa_jax.UserError, match="a cached prefix cannot be reused in longer rows"):
    PromptCache.read(model, tiny.params(model), [1, 2])


def test_a_beginning_that_another_plan_read_is_refused(model, params):
  prefix = PromptCache.read(model, params, BEGINNING)
  dense = tiny.model("dense", num_layers=model.config.num_layers)
  with pytest.raises(sa_jax.UserError, match="is of a different model .* than this one \\(plan dense\\)"):
    sa_jax.generate(dense, tiny.params(dense), np.array([BEGINNING]), max_new_tokens=2, prefix=prefix)
  with pytest.raises(sa_jax.UserError, match="is of a different model"):
    Batcher(dense, tiny.params(dense), Serving(slots=1, capacity=64), prefix=prefix)


@pytest.mark.parametrize("slots", [64, 3])
def test_samples_are_rows_of_repeated_prompts(model, params, slots):
  tokens, lengths = right_pad(PROMPTS[:2])
  how = {"max_new_tokens": 6, "sampler": Sampler(1.0, log_probs=True), "seed": 5, "slots": slots}
  found = sa_jax.generate(model, params, tokens, lengths, **how, samples=3)
  repeated = sa_jax.generate(model, params, np.repeat(tokens, 3, axis=0), np.repeat(lengths, 3), **how)
  np.testing.assert_array_equal(found.tokens, repeated.tokens)
  np.testing.assert_allclose(found.log_probs, repeated.log_probs, atol=1e-5)
  assert len(np.unique(found.tokens[:3], axis=0)) == 3
