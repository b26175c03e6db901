"""Judging and searching plans."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sa_jax
from sa_jax.analysis import align, search
from sa_jax.analysis.budget import Budget
from sa_jax.analysis.distilling import Distillation, Distilled
from sa_jax.analysis.forecast import Counts
from sa_jax.analysis.judge import Judge, Walk
from sa_jax.analysis.record import Record
from sa_jax.analysis.refit import Refit, refit
from sa_jax.analysis.share import Effort, Search, search_plan, share
from sa_jax.analysis.texts import Text
from sa_jax.config import ModelConfig
from tests import tiny

CONFIG = ModelConfig(
  vocab_size=47, embed_dim=24, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=32, eos_token_ids=()
)
DENSE = sa_jax.Transformer(CONFIG, sa_jax.SharingPlan.dense(5))
RNG = np.random.default_rng(0)
TEXTS = [Text(name, *RNG.integers(0, 47, (2, 8, 16), np.int32)) for name in ("one", "two")]
HOW = Refit(mlp=True, mlp_ridge=1.0)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(jnp.asarray, tiny.params(DENSE))


@pytest.fixture(scope="module")
def judge(params):
  return Judge(DENSE, params, TEXTS, HOW, chunk=8)


def test_losses_are_those_of_the_refitted_model(judge, params):
  plan = sa_jax.SharingPlan.parse("0:1,2:3-4", 5)
  mapped = judge.with_maps(plan)
  calibration = np.concatenate([text.calibration for text in TEXTS])
  made = refit(DENSE, params, mapped, calibration, HOW, chunk=8)
  for index, text in enumerate(TEXTS):
    want = sa_jax.perplexity(made.model, made.params, text.judging, batch_size=8).loss
    assert judge.losses(plan)[index] == pytest.approx(want, abs=2e-5)
    dense = sa_jax.perplexity(DENSE, params, text.judging, batch_size=8).loss
    assert judge.dense[index] == pytest.approx(dense, abs=1e-5)


def test_a_walk_from_another_plans_streams_is_the_same(judge):
  base = judge.walk(sa_jax.SharingPlan.parse("1:2", 5), keep=True)
  for text in ("1:2,3:4", "1:2-3", "0:1-2", "2:3"):
    plan = sa_jax.SharingPlan.parse(text, 5)
    np.testing.assert_allclose(judge.walk(plan, base).losses, judge.walk(plan).losses, atol=1e-6)


def test_without_recovery_it_is_the_pruned_models_loss(params):
  judge = Judge(DENSE, params, TEXTS, None, maps=False, chunk=8)
  plan = sa_jax.SharingPlan.parse("1:2-3", 5)
  model, pruned = align.shared_model(CONFIG, params, plan)
  want = sa_jax.perplexity(model, pruned, TEXTS[0].judging, batch_size=8).loss
  assert judge.losses(plan)[0] == pytest.approx(want, abs=1e-5)


def test_greedy_takes_the_best_of_every_step(judge):
  found = search.beam(judge, 2)
  singles = [sa_jax.SharingPlan.from_followers(5, [layer]) for layer in range(1, 5)]
  first = min(singles, key=lambda plan: judge.increase(judge.losses(plan)))
  assert found[0].plan == first
  pairs = [
    sa_jax.SharingPlan.from_followers(5, {*first.followers, layer}) for layer in range(1, 5) if first.is_anchor(layer)
  ]
  assert found[1].plan == min(pairs, key=lambda plan: judge.increase(judge.losses(plan)))
  everything = search.beam(judge, 2, width=4)[1]
  all_pairs = [sa_jax.SharingPlan.from_followers(5, pair) for pair in itertools.combinations(range(1, 5), 2)]
  assert everything.plan == min(all_pairs, key=lambda plan: judge.increase(judge.losses(plan)))


def test_pair_costs_predict_measured_losses(judge):
  costs = judge.costs(reach=4)
  assert np.isfinite(costs).sum() == 10
  assert (costs[np.isfinite(costs)] > 0).all()
  swapped = search.improve(judge, search.best_of(judge, [sa_jax.SharingPlan.parse("3:4", 5)]), costs, tries=3)
  assert swapped.increase == min(
    judge.increase(judge.losses(sa_jax.SharingPlan.from_followers(5, [layer]))) for layer in range(1, 5)
  )


def test_layers_that_are_rotated_otherwise_may_follow():
  """As in SmolLM3, where every fourth layer has no rotary embedding: what a budget promises, a search can choose."""
  still = sa_jax.ops.RopeConfig(scaling="none")
  config = dataclasses.replace(CONFIG, num_layers=3, local_layers=(1,), local_rope=still)
  model = sa_jax.Transformer(config, sa_jax.SharingPlan.dense(3))
  judge = Judge(model, jax.tree.map(jnp.asarray, tiny.params(model)), TEXTS[:1], None, maps=False, chunk=8)
  costs, most = judge.costs(reach=2), Budget("followers", 2).most(config)
  assert np.isfinite(costs).sum() == 3 == Counts.of(config, most, Search("dp", reach=2)).pairs
  assert str(search.cheapest(costs, most)) == "0:1-2"


@pytest.mark.parametrize("excluded", [(), (3,)])
def test_cheapest_plan_by_trying_all(excluded):
  costs = np.random.default_rng(1).random((7, 7))
  costs[0, 4:] = np.inf
  for followers in range(1, 5):
    free = [layer for layer in range(1, 7) if layer not in excluded]
    plans = [sa_jax.SharingPlan.from_followers(7, chosen) for chosen in itertools.combinations(free, followers)]
    want = min(plans, key=lambda plan: search.plan_cost(plan, costs))
    assert search.cheapest(costs, followers, excluded) == want
  with pytest.raises(ValueError, match="increase the reach"):
    search.cheapest(np.full((7, 7), np.inf), 2)
  with pytest.raises(ValueError, match=r"no layer may follow: every layer that could is excluded \(see `excluded`\)"):
    search.cheapest(costs, 1, range(1, 7))


@pytest.mark.parametrize("plans", [[], None, {"1:2": "x"}, {"1:2": 3.0}, {"1:2": [1.0]}, {"1:2": [1.0, None]}])
def test_a_damaged_record_is_refused(tmp_path, plans):
  """Not a traceback, and never the loss of one text taken for that of two."""
  file, settings = tmp_path / "record.json", {"texts": {"one": "a", "two": "b"}}
  file.write_text(json.dumps({"settings": settings, "plans": {"1:2": [1.0, math.nan]}}))
  assert Record(file, settings).get("1:2")[0] == 1.0
  file.write_text(json.dumps({"settings": settings, "plans": plans}))
  with pytest.raises(sa_jax.UserError, match=r"record.json is damaged: its plans must have one loss per text"):
    Record(file, settings)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_have_rows(params, chunk):
  for refused in (
    lambda: Judge(DENSE, params, TEXTS, HOW, chunk=chunk),
    lambda: refit(DENSE, params, sa_jax.SharingPlan.parse("1:2", 5), TEXTS[0].calibration, HOW, chunk=chunk),
  ):
    with pytest.raises(sa_jax.UserError, match=rf"^chunk={chunk} \(must be at least 1\)"):
      refused()


@pytest.mark.parametrize(
  "how", [Search("greedy", excluded=(5,)), Search("spans", excluded=(5,)), Search("dp", excluded=(9, 5, 2))]
)
def test_only_layers_that_there_are_stay_anchors(params, judge, how):
  """Told before any text is read."""
  message = r"no layers \[(9, )?5\] to exclude; the model has 0 to 4"
  with pytest.raises(sa_jax.UserError, match=message):
    search_plan(judge, Budget("followers", 2), how)
  with pytest.raises(sa_jax.UserError, match=message):
    share(DENSE, params, TEXTS, 2, Effort(how), stage=pytest.fail)


@pytest.mark.parametrize("strategy", ["dp", "greedy", "spans"])
@pytest.mark.parametrize(
  ("budget", "excluded", "message"),
  [
    (Budget("followers", 3), (2, 4), "3 followers are impossible: only 2 layers may follow"),
    (Budget("ppl", 1.5), (1, 2, 3, 4), "every layer that could is excluded"),
  ],
)
def test_a_budget_beyond_the_layers_left_is_told_before_any_text_is_read(params, strategy, budget, excluded, message):
  with pytest.raises(sa_jax.UserError, match=message):
    share(DENSE, params, TEXTS, budget, Effort(Search(strategy, excluded=excluded)), stage=pytest.fail)


def test_excluded_layers_that_leave_no_span_or_contradict_the_plan_are_named(params, judge):
  with pytest.raises(sa_jax.UserError, match=r"every late span of 2 followers has one of the excluded layers \[3\]"):
    search_plan(judge, Budget("followers", 2), Search("spans", excluded=(3,)))
  with pytest.raises(sa_jax.UserError, match=r"the plan 1:2-3 has followers \[3\], which `excluded` keeps anchors"):
    share(DENSE, params, TEXTS, sa_jax.SharingPlan.parse("1:2-3", 5), Effort(Search(excluded=(3,))), stage=pytest.fail)


@pytest.mark.parametrize("wanted", [np.int64(2), sa_jax.SharingPlan.parse("1:2", 5)])
@pytest.mark.parametrize(
  ("texts", "message"),
  [
    ([], "give one or more texts with different names, not none"),
    ([TEXTS[0], TEXTS[1]._replace(name="one")], "different names, not one, one"),
    ([TEXTS[0], TEXTS[1]._replace(calibration=TEXTS[1].calibration[:, 1:])], "for calibration have 15, 16 tokens"),
    ([TEXTS[0], TEXTS[1]._replace(judging=TEXTS[1].judging[:0])], "at least one row"),
    ([TEXTS[0]._replace(judging=TEXTS[0].judging[:, :1])], "rows need at least 2 tokens, one to predict from"),
  ],
)
def test_texts_that_cannot_be_judged_by_are_refused_at_the_door(params, wanted, texts, message):
  with pytest.raises(sa_jax.UserError, match=message):
    share(DENSE, params, texts, wanted, stage=pytest.fail)


def test_a_search_resumes_from_its_record(params, tmp_path):
  record = tmp_path / "record.json"
  first = Judge(DENSE, params, TEXTS, HOW, chunk=8, record=record)
  plan = sa_jax.SharingPlan.parse("2:3", 5)
  want = first.losses(plan)
  again = Judge(DENSE, params, TEXTS, HOW, chunk=8, record=record)
  again.walk = None  # nothing is measured anew
  np.testing.assert_array_equal(again.losses(plan), want)
  with pytest.raises(ValueError, match="different settings"):
    Judge(DENSE, params, TEXTS, None, chunk=8, record=record)
  others = [text._replace(calibration=text.calibration[::-1]) for text in TEXTS]
  with pytest.raises(ValueError, match="different settings"):
    Judge(DENSE, params, others, HOW, chunk=8, record=record)
  record.write_text("[]")
  with pytest.raises(ValueError, match="not the record"):
    Judge(DENSE, params, TEXTS, HOW, chunk=8, record=record)


def test_pareto_front_has_no_dominated_plan(judge):
  for chosen in ((1,), (4,), (1, 2), (3, 4)):
    judge.losses(sa_jax.SharingPlan.from_followers(5, chosen))
  front = search.pareto(judge)
  counts, increases = [len(each.plan.followers) for each in front], [each.increase for each in front]
  assert counts == sorted(set(counts))
  assert increases == sorted(increases)
  for plan, losses in judge.measured.items():
    as_many = [each.increase for each in front if len(each.plan.followers) >= len(plan.followers)]
    assert min(as_many) <= judge.increase(losses)


def test_spans_and_budgets():
  def spans(layers, followers, **kinds):
    config = dataclasses.replace(CONFIG, num_layers=layers, **kinds)
    return [str(plan) for plan in search.late_spans(config, followers)]

  assert spans(6, 2) == ["3:4-5"]
  assert spans(8, 2) == ["4:5-6", "5:6-7"]
  assert spans(4, 3) == ["0:1-3"]
  assert spans(4, 4) == []
  kinds = {"window": 4, "local_layers": (0, 1, 2, 4, 5, 6)}  # as Gemma's: layers 3 and 7 see everything
  assert spans(8, 2, **kinds) == ["4:5-6"]
  assert spans(8, 3, **kinds) == ["1:2,4:5-6"]


class Priced:
  """A judge of plans that cost so many nats for each layer that follows."""

  config, nats = CONFIG, np.array([0.0, 0.1, 0.01, 0.02, 0.3])

  def losses(self, plan, base=None):
    del base
    return np.array([self.nats[list(plan.followers)].sum()])

  def increase(self, losses):
    return float(losses.mean())

  def walk(self, plan, base=None, keep=False):
    del base, keep
    return Walk(plan, (), self.losses(plan))

  def costs(self, reach, progress=None):
    del reach, progress
    return np.where(np.triu(np.ones((5, 5)), 1) > 0, self.nats[None], np.inf)


@pytest.mark.parametrize(
  ("how", "followers"),
  [(Search("greedy"), (2, 3)), (Search("beam", width=2, shortlist=3), (2, 3)), (Search("dp"), (2, 3)),
   (Search("spans"), (3,)), (Search("greedy", excluded=(3,)), (2,))],
)  # fmt: skip
def test_a_limit_of_perplexity_takes_the_most_followers_within_it(how, followers):
  found = search_plan(Priced(), Budget("ppl", math.exp(0.05)), how)
  assert found.plan.followers == followers
  assert found.increase == pytest.approx(Priced.nats[list(followers)].sum())
  everything = search_plan(Priced(), Budget("ppl", math.exp(0.5)), how).plan.followers
  assert everything == tuple(layer for layer in (1, 2, 3, 4) if layer not in how.excluded)
  with pytest.raises(sa_jax.UserError, match=r"one follower .* exceeds the budget of ppl=1.005"):
    search_plan(Priced(), Budget("ppl", 1.005), how)


def test_share_distils_a_plan_at_last(params):
  """The plan stays, judged loss falls, and the perplexities are those of the model that is returned."""
  texts = [Text(name, *np.split(RNG.integers(0, 47, (40, 16), np.int32), [32])) for name in ("one", "two")]
  seen = []

  def stage(name):
    seen.append(name)
    return lambda *_: None

  plan = sa_jax.SharingPlan.parse("0:1-4", 5)
  distillation = Distillation(steps=40, batch_size=16, learning_rate=5e-3)
  made = share(DENSE, params, texts, plan, Effort(calibration_rows=8), chunk=8, distillation=distillation, stage=stage)
  assert made.model.plan.source == made.plan.source == plan.source
  assert made.undistilled is not None
  loss = lambda each: sum(of.loss for of in each.values())
  assert loss(made.shared) < loss(made.undistilled)
  assert seen[-2:] == ["distilling", "scoring, distilled"]
  got = sa_jax.perplexity(made.model, made.params, texts[0].judging, batch_size=4).loss
  assert got == pytest.approx(made.shared["one"].loss, abs=1e-5)
  # The head maps that were folded are there to begin from.
  again = refit(DENSE, params, made.plan, np.concatenate([text.calibration[:8] for text in texts]), Refit(), chunk=8)
  want = sa_jax.perplexity(again.model, again.params, texts[0].judging, batch_size=4).loss
  assert want == pytest.approx(made.undistilled["one"].loss, rel=1e-3)


def with_leaf(params, path, change):
  """The parameters with one leaf changed."""
  name, *rest = path
  return dict(params) | {name: with_leaf(params[name], rest, change) if rest else change(params[name])}


def test_a_layer_without_values_follows_at_no_cost(params, judge):
  """Its head outputs are 0: nothing determines its W_O, which stays; in the search it is the best, not NaN."""
  silent = with_leaf(params, ("layers", "3", "attention", "v_proj", "kernel"), lambda leaf: 0 * leaf)
  (report,) = refit(DENSE, silent, sa_jax.SharingPlan.parse("2:3", 5), TEXTS[0].calibration, chunk=8).reports
  assert report == (3, "attention", 0.0, 0.0, 1.0)
  own = Judge(DENSE, silent, TEXTS, Refit(), chunk=8)
  assert own.costs(reach=2)[1:3, 3].tolist() == [0.0, 0.0]
  assert own.increase(own.losses(sa_jax.SharingPlan.parse("2:3", 5))) == pytest.approx(0, abs=1e-6)
  assert judge.increase(np.array([np.nan, 1.0])) == math.inf


@pytest.mark.parametrize("wanted", [1, sa_jax.SharingPlan.parse("1:2", 5)])
def test_a_dense_model_whose_loss_is_no_number_is_refused(params, wanted):
  broken = with_leaf(params, ("final_norm", "scale"), lambda leaf: leaf * np.inf)
  with pytest.raises(sa_jax.UserError, match=r"the dense model's loss on one, two is not a finite number"):
    share(DENSE, broken, TEXTS, wanted, chunk=8)


def test_a_distilled_model_has_the_dtype_of_the_dense_one(params, monkeypatch):
  """Training is in float32; a checkpoint, and the model's config, have one dtype."""

  def flatter(student, *_):
    """Predicts random text better."""
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), student[1])
    return Distilled(wide | {"final_norm": {"scale": wide["final_norm"]["scale"] / 2}}, 1, np.zeros(1))

  monkeypatch.setattr("sa_jax.analysis.share.distill_rows", flatter)
  half = sa_jax.Transformer(dataclasses.replace(CONFIG, param_dtype="bfloat16"), DENSE.plan)
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  plan = sa_jax.SharingPlan.parse("0:1", 5)
  made = share(half, rounded, TEXTS[:1], plan, chunk=8, distillation=Distillation(steps=1))
  assert made.shared["one"].loss < made.undistilled["one"].loss
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(made.params)} == {"bfloat16"}
