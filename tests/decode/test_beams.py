"""Beam search against every continuation that there is, and against transformers'."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import sa_jax
from sa_jax import Transformer
from sa_jax.decode import Beams, beam_search, right_pad
from tests import tiny

VOCAB, NEW, END = 5, 3, 4
PROMPTS = [[1, 2, 3], [3], [0, 0]]


@pytest.fixture(scope="module")
def model():
  made = tiny.model("0:1", num_layers=2, vocab_size=VOCAB)
  return Transformer(dataclasses.replace(made.config, eos_token_ids=(END,)), made.plan)


@pytest.fixture(scope="module")
def params(model):
  return tiny.params(model)


@pytest.fixture(scope="module")
def every(model, params):
  """Each prompt's continuations, with their log-probabilities: they end at their first end token, or after three."""
  found = []
  for prompt in PROMPTS:
    whole = np.array([[*prompt, *new] for new in itertools.product(range(VOCAB), repeat=NEW)])
    logits = np.asarray(jax.jit(model.apply)({"params": params}, whole), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    values = {}
    for row, scores in zip(whole, log_probs):
      new = row[len(prompt) :].tolist()
      length = new.index(END) + 1 if END in new else NEW
      at = len(prompt) - 1 + np.arange(length)
      values[tuple(new[:length])] = scores[at, new[:length]].sum()
    found.append(values)
  return found


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
def test_a_wide_search_finds_the_best_of_all(model, params, every, penalty):
  found = beam_search(model, params, *right_pad(PROMPTS), Beams(20, NEW, penalty))
  for row, values in enumerate(every):
    ranked = sorted(((value / len(new) ** penalty, new) for new, value in values.items()), reverse=True)[:20]
    np.testing.assert_allclose(found.scores[row], [value for value, _ in ranked], atol=1e-5)
    new = [tuple(tokens[:length].tolist()) for tokens, length in zip(found.tokens[row], found.lengths[row])]
    assert new == [each for _, each in ranked]
  assert len({len(new) for values in every for new in values}) == NEW


def test_more_beams_than_continuations(model, params, every):
  found = beam_search(model, params, *right_pad(PROMPTS), Beams(100, NEW))
  count = len(every[0])
  assert count == 1 + 4 + 4 * 4 * 5
  assert (found.lengths[:, count:] == 0).all()
  assert (found.lengths[:, :count] > 0).all()
  np.testing.assert_allclose(np.exp(found.scores[0][:count] * found.lengths[0][:count]).sum(), 1, atol=1e-5)


def test_one_beam_is_greedy_and_padding_changes_nothing(params):
  model = tiny.model("0:1", num_layers=2, vocab_size=VOCAB)
  greedy = sa_jax.generate(model, params, *right_pad(PROMPTS), max_new_tokens=8)
  found = beam_search(model, sa_jax.stack(params, model.plan), *right_pad(PROMPTS), Beams(1, 8))
  np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
  alone = beam_search(model, params, [PROMPTS[1]], None, Beams(1, 8))
  np.testing.assert_array_equal(alone.tokens[0], found.tokens[1])


def test_beams_are_theirs(tmp_path):
  """transformers' search of the same dense model, where a search that is too narrow finds other continuations."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  model = tiny.model("dense", num_layers=2, vocab_size=30)
  params = tiny.params(model, seed=1)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny.write_hf(tmp_path / "hf", model, params)).eval()
  prompt = np.array([[5, 3, 8], [2, 2, 7]])
  how = dict(return_dict_in_generate=True, output_scores=True, attention_mask=torch.ones(2, 3, dtype=torch.long))
  how |= dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, length_penalty=1.0)
  with torch.no_grad():
    search = lambda width: theirs.generate(torch.tensor(prompt), num_beams=width, num_return_sequences=width, **how)
    wanted = search(3)
    greedy = search(1)
  found = beam_search(model, params, prompt, None, Beams(3, 6))
  np.testing.assert_array_equal(found.tokens.reshape(6, 6), wanted.sequences[:, 3:].numpy())
  np.testing.assert_allclose(found.scores.reshape(-1), wanted.sequences_scores.numpy(), atol=1e-5)
  assert (found.tokens[:, 0] != greedy.sequences[:, 3:].numpy()).any()


def test_refused(model, params):
  with pytest.raises(sa_jax.UserError, match=r"width=0 \(must be at least 1\)"):
    Beams(width=0)
  with pytest.raises(sa_jax.UserError, match="token 5 is outside the vocabulary"):
    beam_search(model, params, [[5]])
