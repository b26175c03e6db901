"""What `share` says beforehand of how long it will take."""

import jax
import jax.numpy as jnp
import pytest

import sa_jax
from sa_jax.analysis import forecast
from sa_jax.analysis.budget import Budget
from sa_jax.analysis.forecast import Counts, with_estimates, work
from sa_jax.analysis.judge import Judge
from sa_jax.analysis.refit import Refit
from sa_jax.analysis.share import EFFORTS, READING, SCORING_DENSE, Effort, Search, refits, search_plan, share
from tests import tiny
from tests.analysis.test_search import CONFIG, DENSE, TEXTS


class Counting(Judge):
  """A judge that counts what it does."""

  plans = pairs = 0

  def walk(self, *given, **named):
    self.plans += 1
    return super().walk(*given, **named)

  def _pair_cost(self, *given):
    self.pairs += 1
    return super()._pair_cost(*given)


@pytest.mark.parametrize(
  "how",
  [
    Search("greedy", shortlist=2, reach=2),
    Search("beam", width=2),
    Search("dp", reach=3),
    Search("spans"),
  ],
  ids=lambda how: how.strategy,
)
def test_a_search_does_what_was_counted(how):
  params = jax.tree.map(jnp.asarray, tiny.params(DENSE))
  judge = Counting(DENSE, params, TEXTS, Refit(), chunk=8)
  search_plan(judge, Budget("followers", 2), how)
  counted = Counts.of(CONFIG, 2, how)
  assert judge.pairs == counted.pairs
  # A beam's parents may have children in common, which are measured once.
  assert judge.plans == counted.plans or (how.strategy == "beam" and judge.plans <= counted.plans)


def test_the_first_stages_speed_tells_the_time(monkeypatch):
  now, said, seen = [0.0], [], []
  monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])
  stage = with_estimates(
    {READING: 10.0, "search": 600.0, "refit": 60.0}, lambda _: lambda *done: seen.append(done), said.append
  )
  stage("another")(1, 1)
  for _ in range(2):
    report = stage(READING)
    for layer in range(1, 6):
      now[0] += 100 if layer == 1 else 2  # the first compiles
      report(layer, 5)
  assert said == ["11 min estimated, plus compilation (search 10 min, refit 60 s)"]
  assert seen == [(1, 1), *((layer, 5) for _ in range(2) for layer in range(1, 6))]


def test_scoring_is_told_through_all_texts():
  """Where nothing is searched, the remaining time is estimated from it: counted, and done, all rows."""
  seen = {}
  plan = sa_jax.SharingPlan.parse("2:3", CONFIG.num_layers)
  stage = lambda name: lambda *done: seen.setdefault(name, []).append(done)
  params = jax.tree.map(jnp.asarray, tiny.params(DENSE))
  share(DENSE, params, TEXTS, plan, Effort(local_epochs=0), stage=stage)
  rows = sum(len(text.judging) for text in TEXTS)
  assert seen[SCORING_DENSE] == seen["scoring, shared"] == [(done, rows) for done in range(1, rows + 1)]
  counted = work(CONFIG, TEXTS, plan, Effort(local_epochs=0), 4)
  assert counted["scoring"] == pytest.approx(counted[SCORING_DENSE])


@pytest.mark.parametrize(
  ("rows", "at_once", "passes"), [(128, 32, [8]), (352, 4, [1]), (352, 6, [2]), (352, 64, [8]), (127, 32, [0, 8])]
)
def test_small_batches_take_fewer_passes_and_little_text_is_tried_without(rows, at_once, passes):
  assert [each.local_epochs for each in refits(Refit(local_epochs=8), rows, at_once)] == passes
  assert [each.local_epochs for each in refits(Refit(), rows, at_once)] == [0]


def test_on_a_gpu_all_text_that_was_not_measured_with_is_tried_without_too(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert [len(refits(Refit(local_epochs=8), rows, 32)) for rows in (176, 351, 352)] == [2, 2, 1]
  assert Effort().most_rows == 176


def test_more_effort_is_more_work_and_twice_the_rows_are_twice_the_work():
  total = lambda effort, texts=TEXTS, wanted=2: sum(work(CONFIG, texts, wanted, effort, 4).values())
  assert total(EFFORTS["quick"]) < total(EFFORTS["good"]) < total(EFFORTS["best"])
  assert total(Effort(), wanted=1) < total(Effort())
  assert total(EFFORTS["good"], wanted=sa_jax.SharingPlan.from_followers(5, (1, 3))) < total(EFFORTS["good"])
  assert total(Effort(), TEXTS + TEXTS) == pytest.approx(2 * total(Effort()))
