"""From a dense model and a budget to a shared model: search, head maps, refit, and what it cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from sa_jax.analysis import search
from sa_jax.analysis.align import can_map_by_refit
from sa_jax.analysis.judge import Judge, Text
from sa_jax.analysis.refit import Refit, Report, refit
from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.evaluation import Perplexity, perplexity
from sa_jax.nn import Transformer
from sa_jax.params import as_runs
from sa_jax.sharding import traced_where_parameters_are
from sa_jax.trees import Params

Strategy = Literal["dp", "greedy", "beam", "spans"]
Stage = Callable[[str], Callable[[int, int], None]]
"""Called with the name of a stage of the work; returns what is called with (done, in all) during it."""


@dataclasses.dataclass(frozen=True)
class Search:
  """How a plan is searched for.

  Raises:
    UserError: if there is no such strategy or a number is out of range.
  """

  strategy: Strategy = "dp"
  """dp: the plan whose pair costs have the least sum, then swaps that lower its measured loss; greedy and beam: one
  follower more at each step, by measured loss; spans: the paper's baseline, the best contiguous late span."""
  reach: int = 5
  """dp and shortlists: farthest anchor considered, in layers before the follower."""
  swaps: int = 0
  """dp: plans to measure in search of an improvement."""
  width: int = 4
  """beam: plans kept at each step."""
  shortlist: int | None = None
  """greedy and beam: candidates measured at each step, those of least pair cost; None measures all."""
  excluded: tuple[int, ...] = ()
  """Layers that stay anchors."""
  search_rows: int | None = None
  """Rows of each text that candidates are fitted to, all when None; the plan found is refitted on all."""

  def __post_init__(self) -> None:
    if self.strategy not in Strategy.__args__:  # type: ignore[attr-defined]
      raise UserError(f"no search strategy {self.strategy!r}; there are {', '.join(Strategy.__args__)}")  # type: ignore[attr-defined]
    least = {"reach": 1, "width": 1, "swaps": 0, "shortlist": 1, "search_rows": 1}
    faults = [
      f"{name} is {value}, and at least {least[name]} is needed"
      for name in least
      if (value := getattr(self, name)) is not None and value < least[name]
    ]
    if faults:
      raise UserError.of("search", faults)


@dataclasses.dataclass(frozen=True)
class Effort:
  """How much work goes into a shared model."""

  search: Search
  """Search."""
  calibration_rows: int
  """Most rows of each text to fit to."""
  judging_rows: int
  """Most further rows of each text to judge by."""
  mlp: bool
  """Whether MLPs are refitted."""

  def recovery(self, config: ModelConfig) -> Refit:
    """The refit of the plan that is found."""
    return Refit(maps=can_map_by_refit(config), mlp=self.mlp)


EffortName = Literal["quick", "good", "best"]
EFFORTS: dict[EffortName, Effort] = {
  "quick": Effort(Search(), 8, 4, mlp=False),
  "good": Effort(Search("greedy", shortlist=8, search_rows=16), 176, 16, mlp=True),
  "best": Effort(Search("beam", width=3, shortlist=16, search_rows=32), 176, 16, mlp=True),
}
"""By name. ``good`` is what `experiments/search` measures."""


def search_plan(judge: Judge, followers: int, how: Search, stage: Stage = lambda _: lambda *_: None) -> search.Found:
  """The plan with this many followers that a search proposes.

  Args:
    judge: measures plans.
    followers: how many.
    how: the strategy.
    stage: told what is being done.

  Raises:
    UserError: if no plan has so many followers under the search's limits.
  """
  excluded = how.excluded
  if how.strategy == "spans":
    spans = search.late_spans(judge.config.num_layers, followers)
    allowed = [plan for plan in spans if not set(excluded) & set(plan.followers) and search.fits(judge.config, plan)]
    return search.best_of(judge, allowed, stage("measuring spans"))
  if how.strategy == "dp":
    costs = judge.costs(how.reach, stage("estimating pairs"))
    found = search.best_of(judge, [search.cheapest(costs, followers, excluded)], stage("measuring the plan"))
    return search.improve(judge, found, costs, tries=how.swaps, excluded=excluded, progress=stage("trying swaps"))
  shortlist: search.Shortlist | None = None
  if how.shortlist is not None:
    shortlist = search.Shortlist(how.shortlist, judge.costs(how.reach, stage("estimating pairs")))
  return search.beam(
    judge,
    followers,
    width=how.width if how.strategy == "beam" else 1,
    shortlist=shortlist,
    excluded=excluded,
    progress=stage("measuring candidates"),
  )[-1]


class Shared(NamedTuple):
  """What `share` returns.

  Attributes:
    model: of the plan found, with the head maps that could not be folded.
    params: in the layer layout, pruned and refitted: an ordinary checkpoint.
    dense: the dense model's perplexity of each text's judging rows.
    shared: the shared model's.
    reports: what was refitted.
  """

  model: Transformer
  params: Params
  dense: dict[str, Perplexity]
  shared: dict[str, Perplexity]
  reports: list[Report]


@traced_where_parameters_are
def share(
  model: Transformer,
  params: Params,
  texts: Sequence[Text],
  followers: int,
  *,
  how: Search | None = None,
  recovery: Refit | None = None,
  chunk: int = 4,
  stage: Stage = lambda _: lambda *_: None,
) -> Shared:
  """Finds a plan, aligns heads, refits, and measures: everything without training.

  Args:
    model: the dense model.
    params: in the layer layout, queries and keys of every layer included.
    texts: to calibrate on and, by their other rows, to judge by.
    followers: how many layers shall share; see `sa_jax.analysis.search.followers_for`.
    how: the search.
    recovery: the refit of the plan; when None, of W_O, with head maps by refit error where the model is small enough
      for them, and else by similarity. Candidates are judged after a refit of W_O.
    chunk: rows computed at once.
    stage: told what is being done.

  Raises:
    UserError: as `Judge`, `search_plan` and `refit`.
  """
  recovery, how = recovery or Refit(maps=can_map_by_refit(model.config)), how or Search()
  judged = [text._replace(calibration=text.calibration[: how.search_rows]) for text in texts]
  by_heads = dataclasses.replace(recovery, mlp=False, values=0)
  judge = Judge(model, params, judged, by_heads, chunk=chunk, progress=stage("reading the texts"))
  plan = judge.with_maps(search_plan(judge, followers, how, stage).plan)
  del judge
  calibration = np.concatenate([text.calibration for text in texts])
  made = refit(model, params, plan, calibration, recovery, chunk=chunk, progress=stage("refitting"))
  results = []
  for label, each, weights in (("dense", model, params), ("shared", made.model, made.params)):
    runs = as_runs(weights, each.plan)
    report = stage(f"scoring, {label}")
    results.append({text.name: perplexity(each, runs, text.judging, batch_size=1, progress=report) for text in texts})
  dense, shared = results
  return Shared(made.model, made.params, dense, shared, made.reports)
