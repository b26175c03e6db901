"""What `share` says beforehand of how long it will take."""

import jax
import jax.numpy as jnp
import pytest

from sa_jax.analysis import forecast
from sa_jax.analysis.budget import Budget
from sa_jax.analysis.forecast import Counts, foretold, work
from sa_jax.analysis.judge import Judge
from sa_jax.analysis.refit import Refit
from sa_jax.analysis.share import EFFORTS, READING, Effort, Search, search_plan
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
  stage = foretold(
    {"reading": 10.0, "search": 600.0, "refit": 60.0}, lambda _: lambda *done: seen.append(done), said.append
  )
  stage("another")(1, 1)
  report = stage(READING)
  for layer in range(1, 6):
    now[0] += 100 if layer == 1 else 2  # the first compiles
    report(layer, 5)
  assert said == ["about 11 min, and what compiles: search 10 min, refit 60 s"]
  assert seen == [(1, 1), *((layer, 5) for layer in range(1, 6))]


def test_more_effort_is_more_work_and_twice_the_rows_are_twice_the_work():
  total = lambda effort, texts=TEXTS, followers=2: sum(work(CONFIG, texts, followers, effort).values())
  assert total(EFFORTS["quick"]) < total(EFFORTS["good"]) < total(EFFORTS["best"])
  assert total(Effort(), followers=1) < total(Effort())
  assert total(Effort(), TEXTS + TEXTS) == pytest.approx(2 * total(Effort()))
