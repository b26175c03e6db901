"""Drafts change how fast tokens come, and not which."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import SharingPlan, Transformer, decode
from sa_jax.decode import Draft, Sampler, Settings, accept, right_pad, speculate
from sa_jax.sharding import make_mesh, param_shardings
from tests import tiny

PROMPTS = [[5, 9, 3, 7], [11, 2], [40, 41, 42]]
NEW = 20
PLAN = "0:1-2"


@pytest.fixture(scope="module")
def model():
  return tiny.model("dense", num_layers=4)


@pytest.fixture(scope="module")
def params(model):
  """So that drafts are often right: later layers change little."""
  params = tiny.params(model)
  for layer in "123":
    for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
      params["layers"][layer][part][name]["kernel"] *= 0.5
  return params


@pytest.fixture(scope="module")
def greedy(model, params):
  return sa_jax.generate(model, params, *right_pad(PROMPTS), max_new_tokens=NEW)


DRAFTS = {
  "sharing": lambda model, params, proposals: Draft.sharing(model, params, PLAN, proposals),
  "early exit": lambda model, params, proposals: Draft.early_exit(model, params, 2, proposals),
}


@pytest.mark.parametrize("proposals", [1, 3])
@pytest.mark.parametrize("kind", DRAFTS)
def test_greedy_is_greedy_token_for_token(model, params, greedy, kind, proposals):
  draft = DRAFTS[kind](model, params, proposals)
  out = speculate(model, params, draft, *right_pad(PROMPTS), Settings(NEW))
  np.testing.assert_array_equal(out.tokens, greedy.tokens)
  np.testing.assert_array_equal(out.lengths, greedy.lengths)
  # Some proposals were kept, and some were not.
  most, least = NEW - 1, -(-(NEW - 1) // (proposals + 1))
  assert ((out.rounds < most) & (out.rounds >= least)).all()
  assert (out.rounds > least).any()


def test_a_draft_that_is_the_model_is_always_right(model, params, greedy):
  out = speculate(model, params, Draft(model, params, 4), *right_pad(PROMPTS), Settings(NEW))
  np.testing.assert_array_equal(out.tokens, greedy.tokens)
  assert out.rounds.tolist() == [-(-(NEW - 1) // 5)] * 3


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_draft_has_no_copies(model, params, kind):
  arrays = jax.tree.map(jnp.asarray, params)
  own = {id(leaf) for leaf in jax.tree.leaves(arrays)}
  assert {id(leaf) for leaf in jax.tree.leaves(DRAFTS[kind](model, arrays, 2).params)} < own


def test_rows_end_where_they_do(model, params, greedy):
  """At an end token among proposals, and at the most tokens, each row by itself; rules and probabilities included."""
  ends = (int(greedy.tokens[0, 4]), int(greedy.tokens[1, 9]))
  ending = Transformer(dataclasses.replace(model.config, eos_token_ids=ends), model.plan)
  sampler = Sampler(log_probs=True, processors=(decode.CountPenalty(presence=0.7), decode.NotBefore(ends, 2)))
  wanted = sa_jax.generate(ending, params, *right_pad(PROMPTS), max_new_tokens=NEW, sampler=sampler)
  out = speculate(
    ending, params, Draft.early_exit(ending, params, 2, 3), *right_pad(PROMPTS), Settings(NEW, sampler=sampler)
  )
  np.testing.assert_array_equal(out.tokens, wanted.tokens)
  np.testing.assert_array_equal(out.lengths, wanted.lengths)
  np.testing.assert_allclose(out.log_probs, wanted.log_probs, atol=1e-4)
  assert len(set(wanted.lengths.tolist())) > 1


def test_over_two_devices(greedy):
  model = tiny.model("dense", num_layers=4, vocab_size=64)
  params = jax.tree.map(jnp.asarray, tiny.params(model))
  wanted = speculate(model, params, Draft.sharing(model, params, PLAN), *right_pad(PROMPTS), Settings(6))
  mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
  split = jax.device_put(params, param_shardings(model, mesh, layout="layers"))
  found = speculate(model, split, Draft.sharing(model, split, PLAN), *right_pad(PROMPTS), Settings(6))
  np.testing.assert_array_equal(found.tokens, wanted.tokens)


def frequencies(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  counts = collections.Counter(map(tuple, rows.tolist()))
  return np.array([counts[key] for key in itertools.product(*map(range, shape))]) / len(rows)


def close(found: np.ndarray, wanted: np.ndarray, draws: int) -> None:
  """Each frequency within 4.5 standard errors."""
  assert (np.abs(found - wanted) <= 4.5 * np.sqrt(wanted * (1 - wanted) / draws) + 1e-9).all()


def test_what_is_accepted_is_distributed_as_wanted():
  """Proposals by one distribution, accepted for another: the first token, and the second where there is one."""
  draws = 40_000
  q = jnp.array([[0.7, 0.1, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
  p = jnp.array([[0.2, 0.3, 0.1, 0.4], [0.05, 0.9, 0.0, 0.05], [0.4, 0.3, 0.2, 0.1]])

  def one(key):
    draft, rest = jax.random.split(key)
    tokens = jax.random.categorical(draft, jnp.log(q), axis=-1).astype(jnp.int32)
    kept, own = accept(p[None], q[None], tokens[None], rest[None])
    return kept[0], jnp.where(jnp.arange(3) < kept[0], jnp.pad(tokens, (0, 1)), own[0])

  kept, tokens = map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), draws)))
  close(frequencies(tokens[:, :1], (4,)), np.asarray(p[0], np.float64), draws)
  rate = np.minimum(p, jnp.pad(q, ((0, 1), (0, 0)))).sum(1)  # how often a proposal is kept
  more = kept >= 1
  assert abs(more.mean() - rate[0]) < 4.5 * np.sqrt(rate[0] * (1 - rate[0]) / draws)
  close(frequencies(tokens[more, 1:2], (4,)), np.asarray(p[1], np.float64), more.sum())
  assert abs((kept == 2).mean() - rate[0] * rate[1]) < 0.01
  close(frequencies(tokens[kept == 2, 2:3], (4,)), np.asarray(p[2], np.float64), (kept == 2).sum())


def test_samples_are_distributed_as_the_models():
  """Three tokens out of a vocabulary of four: their frequencies, and their probabilities by the dense model."""
  draws, size = 2048, 4
  model = tiny.model("dense", num_layers=4, vocab_size=size)
  params = jax.tree.map(lambda x: 0.7 * x, tiny.params(model))
  sampler = Sampler(1.3, top_k=3)
  draft = Draft.sharing(model, params, PLAN, 2)
  out = speculate(model, params, draft, np.ones((draws, 1), np.int32), None, Settings(3, sampler, seed=1))
  every = np.array(list(itertools.product(range(size), repeat=3)))
  whole = np.concatenate([np.ones((len(every), 1), np.int32), every], axis=1)
  logits = jax.jit(lambda params: model.apply({"params": params}, whole))(params)[:, :3]
  probabilities = sampler.probabilities(logits.reshape(-1, size)).reshape(len(every), 3, size)
  wanted = np.take_along_axis(np.asarray(probabilities, np.float64), every[:, :, None], axis=2).prod(axis=(1, 2))
  np.testing.assert_allclose(wanted.sum(), 1, atol=1e-5)
  close(frequencies(out.tokens, (size,) * 3), wanted, draws)
  assert 1 <= out.rounds.mean() < 2


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda model, params: Draft.early_exit(model, params, 4), "an early exit must be after 1 to 3 layers, not 4"),
    (lambda model, params: Draft(model, params, 0), r"proposals=0 \(must be at least 1\)"),
    (
      lambda model, params: Draft.sharing(
        Transformer(model.config, SharingPlan.parse("0:1", 4)),
        sa_jax.prune(params, SharingPlan.parse("0:1", 4)),
        "1:2",
      ),
      r"makes layers \[1\] anchors, but the parameters have no q_proj",
    ),
    (
      lambda model, params: speculate(
        model, params, Draft(tiny.model("dense", num_layers=2, vocab_size=7), params), [[1]]
      ),
      "the model has 61 tokens, the draft 7",
    ),
  ],
)
def test_refused(model, params, make, message):
  with pytest.raises(sa_jax.UserError, match=message):
    make(model, params)
