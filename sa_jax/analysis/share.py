"""From a dense model and a budget to a shared model: search, head maps, refit, distillation and evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from sa_jax.analysis import search
from sa_jax.analysis.align import can_map_by_refit
from sa_jax.analysis.budget import Budget
from sa_jax.analysis.distilling import Distillation, distill_rows
from sa_jax.analysis.judge import Judge
from sa_jax.analysis.mixture import Mixture, increases, within
from sa_jax.analysis.refit import Refit, Report, refit
from sa_jax.analysis.texts import Text, check_dense, check_texts
from sa_jax.config import ModelConfig
from sa_jax.display import Progress, table
from sa_jax.distributed import same_call_on_all
from sa_jax.errors import UserError
from sa_jax.evaluation import Perplexity, perplexity
from sa_jax.fields import Count, Natural, check_fields
from sa_jax.nn import Transformer
from sa_jax.params import as_runs
from sa_jax.plan import SharingPlan
from sa_jax.sharding import traced_where_parameters_are
from sa_jax.trees import Params

Strategy = Literal["dp", "greedy", "beam", "spans"]


@dataclasses.dataclass(frozen=True)
class Search:
  """Settings of a plan search.

  Raises:
    UserError: if the strategy is unknown or a number is out of range.
  """

  strategy: Strategy = "dp"
  """dp: the plan with the lowest sum of pair costs, then swaps that lower its measured loss; greedy and beam: add one
  follower per step, by measured loss; spans: the paper's baseline, the best contiguous late span."""
  reach: Count = 5
  """dp and shortlists: maximum distance between a follower and its anchor, in layers."""
  swaps: Natural = 0
  """dp: number of plans to measure for improvements."""
  width: Count = 4
  """beam: plans kept per step."""
  shortlist: Count | None = None
  """greedy and beam: number of candidates to measure per step, by lowest pair cost; None for all."""
  excluded: tuple[Natural, ...] = ()
  """Layers that must stay anchors."""
  search_rows: Count | None = None
  """Rows of each text to fit candidates on; None for all. The final plan is refitted on all."""

  def __post_init__(self) -> None:
    check_fields(self, "search")

  def check(self, config: ModelConfig, budget: Budget) -> None:
    """Checks the settings against a model and a budget, before any work.

    Raises:
      UserError: if an excluded layer does not exist, or too few layers are left for the budget.
    """
    search.check_excluded(self.excluded, config.num_layers)
    if budget.allow == ("sharing",):
      most = budget.most(config)
      free = len(set(config.can_follow) - set(self.excluded))
      search.check_count(most if math.isinf(budget.nats) else 1, free)


@dataclasses.dataclass(frozen=True)
class Effort:
  """How much work goes into a shared model.

  Head maps are chosen by refit error if the model is small enough, otherwise by similarity; candidates are measured
  after a refit of W_O.

  Raises:
    UserError: if a number is out of range.
  """

  search: Search = Search()
  """Search."""
  calibration_rows: Count | None = None
  """Maximum rows of each text to fit on; None for 176, or 64 on a CPU."""
  judging_rows: Count = 16
  """Maximum held-out rows of each text."""
  mlp: bool = False
  """Refit MLPs; experts are never refitted."""
  local_epochs: Natural = 0
  """Passes over the text, in batches of 32 rows, that train each group to match the dense model's blocks. Smaller
  batches, as on a CPU, take fewer passes for the same number of steps."""

  def __post_init__(self) -> None:
    check_fields(self, "effort")

  @property
  def most_rows(self) -> int:
    """Maximum rows of each text to fit on, on this machine."""
    return self.calibration_rows or _usual_rows()

  def recovery(self, config: ModelConfig) -> Refit:
    """The settings of the final plan's refit."""
    mlp = self.mlp and config.experts is None
    return Refit(maps=can_map_by_refit(config), mlp=mlp, local_epochs=self.local_epochs)


EffortName = Literal["quick", "good", "best"]
EFFORTS: dict[EffortName, Effort] = {
  "quick": Effort(calibration_rows=8, judging_rows=4),
  "good": Effort(Search("greedy", shortlist=8, search_rows=16), mlp=True, local_epochs=8),
  "best": Effort(Search("beam", width=3, shortlist=16, search_rows=32), 176, mlp=True, local_epochs=16),
}
"""Effort settings by name. On an accelerator, ``good`` is what `experiments/search` measures."""


READING = "reading the texts"
"""The first stage if a plan is searched for."""
SCORING_DENSE = "scoring, dense"
"""The first stage without a search."""
_ROWS_OF_A_STEP = 32
"""Rows per step of local reconstruction on an accelerator."""


def _usual_rows() -> int:
  """Default maximum of rows of each text to fit on."""
  return 64 if jax.default_backend() == "cpu" else 176


def rows_at_once(chunk: int) -> int:
  """Rows per batch of a refit, which computes no logits; these limit the rows elsewhere."""
  return chunk if jax.default_backend() == "cpu" else max(chunk, _ROWS_OF_A_STEP)


def refits(recovery: Refit, rows: int, at_once: int) -> list[Refit]:
  """The refits to compare: the recovery and, with fewer rows than two texts usually have, also the recovery without
  local reconstruction.

  Args:
    recovery: see `Effort.recovery`.
    rows: number of calibration rows.
    at_once: rows per step of local reconstruction.
  """
  passes = math.ceil(recovery.local_epochs * min(at_once, _ROWS_OF_A_STEP) / _ROWS_OF_A_STEP)
  trained = dataclasses.replace(recovery, local_epochs=passes)
  if rows >= 2 * _usual_rows():  # On an accelerator, local reconstruction was always better: `experiments/search`.
    return [trained]
  return list(dict.fromkeys([dataclasses.replace(recovery, local_epochs=0), trained]))


def search_plan(judge: Judge, budget: Budget, how: Search, stage: search.Stage = search.no_stage) -> search.Found:
  """Searches for a plan within a budget.

  Args:
    judge: measures plans.
    budget: a number of followers, or the allowed increase of the loss.
    how: the search settings.
    stage: called with the name of each stage.

  Raises:
    UserError: if no plan within the search's limits has that many followers, or none is within the budget.
  """
  how.check(judge.config, budget)
  followers = budget.most(judge.config)
  if how.strategy in ("greedy", "beam"):
    best = _grown(judge, budget, how, stage)
    return best[-1] if best else search.too_much(budget)
  if how.strategy == "spans":
    return search.most_within(budget, followers, lambda count: _best_span(judge, count, how, stage))
  costs = judge.costs(how.reach, stage("estimating pairs"))
  cheapest = lambda count: search.best_of(judge, [search.cheapest(costs, count, how.excluded)])
  found = search.most_within(budget, followers, cheapest)
  return search.improve(judge, found, costs, tries=how.swaps, excluded=how.excluded, progress=stage("trying swaps"))


def plans_by_followers(
  judge: Judge, most: int, how: Search, stage: search.Stage = search.no_stage
) -> list[SharingPlan]:
  """A plan for each feasible number of followers up to ``most``; arguments as in `search_plan`."""
  if how.strategy in ("greedy", "beam"):
    return [each.plan for each in _grown(judge, most, how, stage)]
  if how.strategy == "spans":
    counts = [count for count in range(1, most + 1) if _spans(judge, count, how)]
    return [_best_span(judge, count, how, stage).plan for count in counts]
  return search.each_cheapest(judge.costs(how.reach, stage("estimating pairs")), most, how.excluded)


def _grown(judge: Judge, budget: Budget | int, how: Search, stage: search.Stage) -> list[search.Found]:
  """`search.beam` with these settings."""
  shortlist = None
  if how.shortlist is not None:
    shortlist = search.Shortlist(how.shortlist, judge.costs(how.reach, stage("estimating pairs")))
  width = how.width if how.strategy == "beam" else 1
  return search.beam(judge, budget, width=width, shortlist=shortlist, excluded=how.excluded, stage=stage)


def _best_span(judge: Judge, count: int, how: Search, stage: search.Stage) -> search.Found:
  """The best of `_spans`."""
  if not (spans := _spans(judge, count, how)):
    raise UserError(
      f"every late span of {count} followers has one of the excluded layers {sorted(how.excluded)}: exclude fewer "
      "(`excluded`), or use another `strategy`"
    )
  return search.best_of(judge, spans, stage(f"measuring spans of {count}"))


def _spans(judge: Judge, count: int, how: Search) -> list[SharingPlan]:
  """`search.late_spans` without excluded layers."""
  spans = search.late_spans(judge.config, count)
  return [plan for plan in spans if not set(how.excluded) & set(plan.followers)]


_REFITTED = 2
"""Number of best mixtures to refit with the full effort; the best of these is kept."""


def find(judge: Judge, budget: Budget, effort: Effort, stage: search.Stage = search.no_stage) -> list[Mixture]:
  """The candidates to refit: the plan within the budget, or the best mixtures if other methods are allowed."""
  if budget.allow == ("sharing",):
    found = [Mixture(search_plan(judge, budget, effort.search, stage).plan)]
  else:
    found = list(mixtures(judge, budget, effort.search, stage))[:_REFITTED]
  return [mixture._replace(plan=judge.with_maps(mixture.plan)) for mixture in found]


def mixtures(judge: Judge, budget: Budget, how: Search, stage: search.Stage = search.no_stage) -> dict[Mixture, float]:
  """Mixtures within a byte budget, by the allowed methods, with their `Judge.increase`, lowest first.

  Raises:
    UserError: see `search_plan`; or if nothing meets the budget.
  """
  config = judge.config
  able = [layer for layer in config.can_follow if layer not in how.excluded]
  some = [SharingPlan.from_followers(config.num_layers, able[: count + 1]) for count in range(len(able))]
  most = max(len(mixture.plan.followers) for mixture in within(config, budget, some))
  plans = plans_by_followers(judge, most, how, stage) if most else []
  return increases(judge, within(config, budget, plans), stage("measuring mixtures"))


class Shared(NamedTuple):
  """What `share` returns.

  Attributes:
    model: the shared model, with the plan, the head maps that could not be folded, the size of values and the cache
      dtype.
    params: in the layer layout, pruned and refitted: an ordinary checkpoint.
    dense: the dense model's perplexity on each text's held-out rows.
    shared: the shared model's perplexity on them, which chose the plan and the recovery.
    reports: the refitted projections.
    mixture: what shrinks its cache; its plan has every head map.
    undistilled: the shared model's perplexity before distillation; None without one. If distillation does not lower
      the perplexity, the model before it is returned.
  """

  model: Transformer
  params: Params
  dense: dict[str, Perplexity]
  shared: dict[str, Perplexity]
  reports: list[Report]
  mixture: Mixture
  undistilled: dict[str, Perplexity] | None = None

  @property
  def plan(self) -> SharingPlan:
    """The plan, with every head map."""
    return self.mixture.plan

  def _repr_html_(self) -> str:
    """The plan as a picture, and perplexities compared with the dense model's, for notebooks."""
    rows = [
      (name, f"{dense.perplexity:.2f}", f"{self.shared[name].perplexity:.2f}") for name, dense in self.dense.items()
    ]
    return self.plan._repr_html_() + table(rows, ["perplexity", "dense", "shared"])


@same_call_on_all
@traced_where_parameters_are
def share(
  model: Transformer,
  params: Params,
  texts: Sequence[Text],
  wanted: Budget | SharingPlan | int,
  effort: Effort | None = None,
  *,
  chunk: int = 4,
  distillation: Distillation | None = None,
  record: Path | None = None,
  stage: search.Stage = search.no_stage,
) -> Shared:
  """Finds a plan, aligns heads, refits, optionally distils, and evaluates.

  Args:
    model: the dense model.
    params: in the layer layout, queries and keys of every layer included.
    texts: calibration and held-out rows.
    wanted: a budget, a number of followers, or the plan itself, with or without head maps, to skip the search.
    effort: the effort settings; None for the defaults of `Effort`.
    chunk: rows per batch.
    distillation: a final distillation, on all calibration rows, including those that the effort leaves out; None for
      none.
    record: a file of measured plans, so that a repeated search does not measure them again.
    stage: called with the name of each stage.

  Raises:
    UserError: see `Judge`, `search_plan`, `refit` and `distill_rows`.
  """
  effort = effort or Effort()
  wanted = Budget("followers", int(wanted)) if isinstance(wanted, int | np.integer) else wanted
  check_texts(texts, model.config.vocab_size)
  recovery = effort.recovery(model.config)
  fitted = _with_rows(texts, effort.most_rows)
  if isinstance(wanted, SharingPlan):
    if taken := sorted(set(wanted.followers) & set(effort.search.excluded)):
      raise UserError(f"the plan {wanted} has followers {taken}, which `excluded` keeps anchors: change one of them")
    candidates = [Mixture(wanted)]
  else:
    if wanted.allow == ("sharing",):
      wanted = wanted.counted(model.config, texts[0].judging.shape[1])
    effort.search.check(model.config, wanted)  # reports impossible requests before any work
    searched = _with_rows(fitted, effort.search.search_rows)
    quick = dataclasses.replace(recovery, mlp=False, local_epochs=0)
    judge = Judge(model, params, searched, quick, chunk=chunk, record=record, progress=stage(READING))
    candidates = find(judge, wanted, effort, stage)
    del judge
  rows = np.concatenate([text.calibration for text in fitted])
  at_once = rows_at_once(chunk)
  score = lambda label, each, weights: _perplexities(each, weights, texts, stage(label))
  dense, best = score(SCORING_DENSE, model, params), None
  check_dense({name: each.loss for name, each in dense.items()})
  for mixture, how in itertools.product(candidates, refits(recovery, len(rows), at_once)):
    narrow = dataclasses.replace(how, value_dim=mixture.value_dim)
    made = refit(model, params, mixture.plan, rows, narrow, chunk=at_once, progress=stage(f"refitting, {mixture}"))
    made_so = made.model.clone(config=mixture.config(made.model.config))
    measured = score("scoring, shared", made_so, made.params)
    found = Shared(made_so, made.params, dense, measured, made.reports, mixture._replace(plan=made.plan))
    best = found if best is None or _loss(found.shared) < _loss(best.shared) else best
  assert best is not None
  if distillation is None:
    return best
  rows = np.concatenate([text.calibration for text in texts])
  done = distill_rows((best.model, best.params), (model, params), rows, distillation, stage("distilling"))
  # Trained in float32; the result, as it is measured and saved, has the model's dtype.
  trained = jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), done.params, best.params)
  distilled = score("scoring, distilled", best.model, trained)
  before = best._replace(undistilled=best.shared)
  return before._replace(params=trained, shared=distilled) if _loss(distilled) < _loss(best.shared) else before


def _with_rows(texts: Sequence[Text], most: int | None) -> list[Text]:
  """The texts with at most this many calibration rows."""
  return [text._replace(calibration=text.calibration[:most]) for text in texts]


def _loss(found: dict[str, Perplexity]) -> float:
  """Mean loss over texts; infinite if it is not a number, so that such a model is never the better one."""
  loss = float(np.mean([each.loss for each in found.values()]))
  return math.inf if math.isnan(loss) else loss


def _perplexities(
  model: Transformer, params: Params, texts: Sequence[Text], progress: Progress
) -> dict[str, Perplexity]:
  """Perplexity on each text's held-out rows; progress counts all of them."""
  runs = as_runs(params, model.plan) if model.config.cache_dtype is None else params
  total, before, found = sum(len(text.judging) for text in texts), 0, {}
  for text in texts:
    through_all = lambda done, _, before=before: progress(before + done, total)
    found[text.name] = perplexity(model, runs, text.judging, batch_size=1, progress=through_all)
    before += len(text.judging)
  return found
