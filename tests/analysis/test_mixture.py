"""One budget of bytes: what fits it is counted, what is taken is judged, and the means alone are among it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax import ops
from sa_jax.analysis import Judge, Text, walk
from sa_jax.analysis.budget import Budget
from sa_jax.analysis.card import card
from sa_jax.analysis.distilling import Distillation
from sa_jax.analysis.mixture import Mixture, bytes_of, increases, within
from sa_jax.analysis.refit import Refit, refit
from sa_jax.analysis.search import no_stage
from sa_jax.analysis.share import Effort, Search, mixtures, share
from tests import tiny

CONFIG = tiny.config(vocab_size=47, num_layers=4)
DENSE = sa_jax.Transformer(CONFIG, sa_jax.SharingPlan.dense(4))
PLANS = [sa_jax.SharingPlan.parse(plan, 4) for plan in ("2:3", "1:2-3", "0:1-3")]
RNG = np.random.default_rng(0)
TEXTS = [Text(name, *np.split(RNG.integers(0, 47, (20, 16), np.int32), [16])) for name in ("one", "two")]


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(DENSE))


def test_what_fits_is_counted():
  """48 of 64 numbers a head and token: 8 keys an anchor, and values; bytes a vector 16, in int8 12, in int4 6."""
  allow = ("sharing", "values", "int8", "int4")
  found = within(CONFIG, Budget("kv", 0.75, allow), PLANS)
  told = [(len(each.plan.followers), each.value_dim, each.cache_dtype) for each in found]
  assert told == [(0, 4, None), (1, 6, None), (2, None, None), (0, None, "int8"), (0, None, "int4")]
  for each in found:
    cache = sa_jax.nn.Cache.empty(
      dataclasses.replace(each.config(CONFIG), dtype="bfloat16"), each.plan, batch=1, capacity=1
    )
    assert each.part(CONFIG) == pytest.approx(cache.nbytes / (4 * 2 * 16 * 2))
    assert each.part(CONFIG) <= 0.75
    gone = bytes_of(CONFIG, each)
    assert (sum(gone.values()), gone["left"]) == (256, cache.nbytes)
  assert str(found[1]) == "1 follower, values of 6"
  assert [each.value_dim for each in within(CONFIG, Budget("kv", 0.75, ("values",)), PLANS)] == [4]
  of_int4 = [str(each) for each in within(CONFIG, Budget("kv", 0.3, allow), PLANS)[2:]]
  assert of_int4 == ["values of 2, int4", "1 follower, values of 6, int4", "2 followers, int4"]  # two numbers a byte
  with pytest.raises(ValueError, match=r"kv cannot be reduced to 40.0% by sharing: the minimum is 62.5%"):
    within(CONFIG, Budget("kv", 0.4, ("sharing",)), PLANS)
  with pytest.raises(ValueError, match="needs a budget such as kv=75%"):
    Budget("followers", 2, allow)


def test_a_model_with_a_quantised_cache_keeps_it():
  config = dataclasses.replace(CONFIG, cache_dtype="int8")
  assert Mixture(PLANS[0]).config(config) == config
  assert Mixture(PLANS[0], cache_dtype="int4").config(config).cache_dtype == "int4"


def test_each_is_judged_as_its_refit_would_be(params):
  """A narrow mixture's judged loss is that of the narrow model; the least comes first."""
  judge = Judge(DENSE, params, TEXTS, Refit(), maps=False)
  options = [Mixture(DENSE.plan, 2), Mixture(PLANS[0], 6), *(Mixture(DENSE.plan, None, each) for each in ops.FORMATS)]
  found = increases(judge, options, no_stage(""))
  assert list(found.values()) == sorted(found.values())
  rows = np.concatenate([text.calibration for text in TEXTS])
  made = refit(DENSE, params, PLANS[0], rows, Refit(value_dim=6))
  loss = [sa_jax.perplexity(made.model, made.params, text.judging).loss for text in TEXTS]
  assert found[options[1]] == pytest.approx(judge.increase(np.array(loss)), abs=1e-4)
  assert all(" values " not in str(plan) for plan in judge.measured)


@pytest.mark.parametrize("cache_dtype", [None, *ops.FORMATS])
def test_a_walk_rounds_as_the_cache_does(params, cache_dtype):
  """With followers, a head map that cannot be folded, and narrow values: a walk is the model that reads its cache."""
  made = refit(DENSE, params, PLANS[1].with_head_maps({3: (0, 0, 3, 1)}), TEXTS[0].calibration, Refit(value_dim=4))
  config = dataclasses.replace(walk.walking(DENSE, params), cache_dtype=cache_dtype)
  rows, padded = TEXTS[0].judging, walk.whole(made.params, params)
  after = walk.through(config, padded, made.model.plan, walk.start(config, padded, rows, 2))
  model = made.model.clone(config=dataclasses.replace(made.model.config, cache_dtype=cache_dtype))
  want = sa_jax.perplexity(model, made.params, rows).loss
  assert walk.losses(config, padded, after, rows).mean() == pytest.approx(want, abs=1e-5)


def test_share_by_bytes(params):
  effort = Effort(Search("dp"), calibration_rows=16, judging_rows=4)
  made = share(DENSE, params, TEXTS, Budget("kv", 0.5, ("sharing", "values", "int8")), effort)
  assert made.mixture.part(CONFIG) <= 0.5
  assert made.model.config.cache_dtype == made.mixture.cache_dtype
  assert made.model.config.value_dim == made.mixture.value_dim
  loss = sa_jax.perplexity(made.model, made.params, TEXTS[0].judging).loss
  assert loss == pytest.approx(made.shared["one"].loss, abs=1e-5)
  told = card("tiny", CONFIG, made, TEXTS, effort, 1.0)
  assert f"left {bytes_of(CONFIG, made.mixture)['left']} bytes" in told


@pytest.mark.parametrize("strategy", ["greedy", "dp", "spans"])
@pytest.mark.parametrize(
  ("changes", "excluded", "followers"),
  [
    ({"window": 4, "local_layers": (0, 2, 4)}, (), 0),  # each layer sees other keys than the one before it
    ({"window": 4, "local_layers": (0, 1, 2, 4)}, (), 2),
    ({}, (1, 2, 3), 2),
  ],
  ids=["none can follow", "local layers", "excluded"],
)
def test_candidates_follow_only_where_they_may(strategy, changes, excluded, followers):
  config = tiny.config(vocab_size=47, num_layers=6, **changes)
  model = sa_jax.Transformer(config, sa_jax.SharingPlan.dense(6))
  judge = Judge(model, jax.tree.map(jnp.asarray, tiny.params(model)), TEXTS[:1], Refit(), maps=False, chunk=8)
  found = mixtures(judge, Budget("kv", 0.6, ("sharing", "values")), Search(strategy, excluded=excluded))
  assert max(len(each.plan.followers) for each in found) == followers
  assert all(each.part(config) <= 0.6 for each in found)
  assert not {layer for each in found for layer in each.plan.followers} & set(excluded)


def test_candidates_stay_within_the_reach():
  config = tiny.config(vocab_size=47, num_layers=6)
  model = sa_jax.Transformer(config, sa_jax.SharingPlan.dense(6))
  judge = Judge(model, jax.tree.map(jnp.asarray, tiny.params(model)), TEXTS[:1], Refit(), maps=False, chunk=8)
  found = mixtures(judge, Budget("kv", 0.5, ("sharing", "values")), Search("dp", reach=1))
  assert max(len(each.plan.followers) for each in found) == 3  # pairs


def test_a_distillation_that_diverges_is_not_kept(params):
  effort = Effort(Search("dp"), calibration_rows=16, judging_rows=4)
  wild = Distillation(steps=3, learning_rate=1e4, batch_size=4)
  made, without = share(DENSE, params, TEXTS, 2, effort, distillation=wild), share(DENSE, params, TEXTS, 2, effort)
  assert made.shared == made.undistilled == without.shared
  assert "distillation" not in card("tiny", CONFIG, made, TEXTS, effort, 1.0)


def test_the_card_of_a_model_with_narrow_values():
  config = dataclasses.replace(CONFIG, value_dim=4)
  model = sa_jax.Transformer(config, sa_jax.SharingPlan.dense(4))
  effort = Effort(Search("dp"), calibration_rows=16, judging_rows=4)
  made = share(model, jax.tree.map(jnp.asarray, tiny.params(model)), TEXTS, 1, effort)
  stored = dataclasses.replace(config, dtype="bfloat16")
  before, after = (sa_jax.nn.Cache.empty(stored, plan, batch=1, capacity=1).nbytes for plan in (model.plan, made.plan))
  assert f"| KV cache, bytes per token | {before} | {after} |" in card("tiny", config, made, TEXTS, effort, 1.0)
