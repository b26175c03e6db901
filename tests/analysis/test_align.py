"""Head alignment: chosen maps, and their folding into weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax.analysis import align, walk
from sa_jax.analysis.refit import refit
from sa_jax.config import ModelConfig
from tests import tiny

CONFIG = ModelConfig(
  vocab_size=47, embed_dim=24, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=32, eos_token_ids=()
)
DENSE = sa_jax.Transformer(CONFIG, sa_jax.SharingPlan.dense(4))
PLAN = sa_jax.SharingPlan.parse("0:1,2:3", 4)
TOKENS = np.random.default_rng(0).integers(0, 47, (6, 16), np.int32)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(DENSE))


def test_similarity_against_numpy(params):
  trace = walk.dense_trace(CONFIG, params, walk.start(CONFIG, params, TOKENS, 2))
  got = align.head_similarity([t.state for t in trace[3]], [t.state for t in trace[1]], block=5)
  states = DENSE.apply({"params": params}, TOKENS, method="states")
  mine, theirs = (np.asarray(states[layer].weights(), np.float64)[..., 1:] for layer in (3, 1))
  products = np.einsum("BNTS,BMTS->NM", mine, theirs)
  norms = [np.sqrt(np.einsum("BNTS,BNTS->N", each, each)) for each in (mine, theirs)]
  np.testing.assert_allclose(got, products / np.outer(*norms), atol=1e-6)


@pytest.mark.parametrize("kind", align.KINDS)
def test_best_map_by_trying_all(kind):
  similarity = np.random.default_rng(1).random((4, 4))
  allowed = {
    "free": itertools.product(range(4), repeat=4),
    "permutation": itertools.permutations(range(4)),
    "group": (p for p in itertools.permutations(range(4)) if align.is_foldable(p, 2)),
  }[kind]
  total = lambda head_map: sum(similarity[n, m] for n, m in enumerate(head_map))
  assert align.best_map(similarity, 2, kind) == max(allowed, key=total)


def test_foldable_maps():
  assert [p for p in itertools.permutations(range(4)) if align.is_foldable(p, 2)] == [
    (0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (2, 3, 1, 0), (3, 2, 0, 1), (3, 2, 1, 0),
  ]  # fmt: skip
  assert not align.is_foldable((0, 0, 2, 3), 2)


def test_folding_gives_the_same_logits_at_no_cost(params):
  plan = PLAN.with_head_maps({1: (3, 2, 0, 1), 3: (1, 1, 0, 3)})
  pruned = sa_jax.prune(params, plan)
  want = sa_jax.Transformer(CONFIG, plan).apply({"params": pruned}, TOKENS)
  folded, left = align.fold(CONFIG, pruned, plan)
  assert left == PLAN.with_head_maps({3: (1, 1, 0, 3)})
  np.testing.assert_allclose(sa_jax.Transformer(CONFIG, left).apply({"params": folded}, TOKENS), want, atol=1e-5)
  unmapped = sa_jax.Transformer(CONFIG, PLAN).apply({"params": pruned}, TOKENS)
  assert np.abs(unmapped - want).max() > 1e-2
  assert sa_jax.cost(CONFIG, left, 2, 16) == sa_jax.cost(CONFIG, PLAN, 2, 16)


def test_align_never_raises_the_loss_and_says_what_it_is(params):
  result = align.align(DENSE, params, PLAN, TOKENS, chunk=3)
  assert result.loss < result.identity_loss
  loss = lambda plan: (
    sa_jax.perplexity(sa_jax.Transformer(CONFIG, plan), sa_jax.prune(params, plan), TOKENS, batch_size=6).loss
  )
  assert result.loss == pytest.approx(loss(result.plan), abs=1e-5)
  assert result.identity_loss == pytest.approx(loss(PLAN), abs=1e-5)


def test_a_layer_that_repeats_its_anchor_in_another_order_is_recognised(params):
  """If layer 1 has layer 0's queries and keys, heads and residual stream alike, alignment finds the order."""
  layers = dict(params["layers"])
  first = {name: dict(part) for name, part in layers["0"].items()}
  # Without MLP and attention output, layer 1 reads what layer 0 read.
  first["mlp"] = {name: {"kernel": 0 * leaf["kernel"]} for name, leaf in first["mlp"].items()}
  first["attention"]["o_proj"] = {"kernel": 0 * first["attention"]["o_proj"]["kernel"]}
  order, kv_order = np.array([3, 2, 0, 1]), np.array([1, 0])
  second = {name: dict(part) for name, part in layers["1"].items()}
  second["attention_norm"] = first["attention_norm"]
  for projection, heads in (("q_proj", order), ("k_proj", kv_order)):
    second["attention"][projection] = {"kernel": first["attention"][projection]["kernel"][:, heads]}
  changed = params | {"layers": layers | {"0": first, "1": second}}
  plan = sa_jax.SharingPlan.parse("0:1", 4)
  result = align.align(DENSE, changed, plan, TOKENS, chunk=3)
  assert result.plan.head_map_of(1) == tuple(order)
  dense = sa_jax.perplexity(DENSE, changed, TOKENS, batch_size=6).loss
  assert result.loss == pytest.approx(dense, abs=1e-5)
  model, pruned = align.shared_model(CONFIG, changed, result.plan)
  assert model.plan == plan
  assert sa_jax.perplexity(model, pruned, TOKENS, batch_size=6).loss == pytest.approx(dense, abs=1e-5)


def test_pruned_parameters_are_refused(params):
  with pytest.raises(ValueError, match=r"layers \[1, 3\] have no q_proj"):
    align.align(DENSE, sa_jax.prune(params, PLAN), PLAN, TOKENS)


@pytest.mark.parametrize("wrong", [TOKENS + 0.5, TOKENS.astype(np.int64) + 2**32])
def test_tokens_are_checked_before_they_are_converted(params, wrong):
  """Fractions would be cut off, and large numbers would wrap around to tokens."""
  for calibrate in (refit, align.align):
    with pytest.raises(sa_jax.UserError, match="tokens must be integers|outside the vocabulary"):
      calibrate(DENSE, params, PLAN, wrong)


def test_nothing_is_aligned_without_a_token_to_predict(params):
  with pytest.raises(sa_jax.UserError, match="rows need at least 2 tokens"):
    align.align(DENSE, params, PLAN, TOKENS[:, :1])


def test_a_map_for_other_heads_is_refused_before_it_is_folded(params):
  with pytest.raises(sa_jax.UserError, match="do not have 4 entries, one per query head"):
    align.shared_model(DENSE.config, params, align.with_map(PLAN, PLAN.followers[0], (1, 1, 1)))
