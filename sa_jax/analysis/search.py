"""Which layers to share: greedy and beam search by loss, dynamic programming over pair costs, and the paper's spans."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from sa_jax.analysis.budget import Budget
from sa_jax.analysis.judge import Judge, Walk
from sa_jax.config import ModelConfig
from sa_jax.display import Progress, table
from sa_jax.errors import UserError
from sa_jax.nn.transformer import check_plan
from sa_jax.plan import SharingPlan

Stage = Callable[[str], Progress]
"""Called with the name of a stage; returns its progress callback, called with (done, total)."""


def no_stage(_: str) -> Progress:
  """A stage without reports."""
  return lambda *_: None


class Found(NamedTuple):
  """The result of a plan search.

  Attributes:
    plan: without head maps.
    losses: float64 ``[texts]``, on the held-out rows, after recovery.
    increase: over the dense model, mean over texts, in nats.
  """

  plan: SharingPlan
  losses: np.ndarray
  increase: float

  def _repr_html_(self) -> str:
    """The plan as a picture, and its loss, for notebooks."""
    return self.plan._repr_html_() + table([("loss over dense, nats per token", f"{self.increase:.4f}")])


def measured(judge: Judge, plans: Mapping[SharingPlan, Walk | None], progress: Progress | None = None) -> list[Found]:
  """Measures plans, each from the walk of another (`Judge.walk`), if there is one."""
  found = []
  for plan, base in plans.items():
    losses = judge.losses(plan, base)
    found.append(Found(plan, losses, judge.increase(losses)))
    if progress is not None:
      progress(len(found), len(plans))
  return found


class Shortlist(NamedTuple):
  """Limits the candidates to measure per step, by lowest sum of pair costs.

  Attributes:
    size: number of candidates.
    costs: pair costs ``[L, L]``.
  """

  size: int
  costs: np.ndarray


def beam(
  judge: Judge,
  budget: Budget | int,
  *,
  width: int = 1,
  shortlist: Shortlist | None = None,
  excluded: Sequence[int] = (),
  stage: Stage = no_stage,
) -> list[Found]:
  """Adds one follower at a time, keeping the plans with the lowest loss; greedy search if ``width`` is 1.

  Args:
    judge: measures plans.
    budget: a number of followers, or the allowed increase of the loss.
    width: plans kept per step.
    shortlist: candidates to measure per step; None for all.
    excluded: layers that must stay anchors.
    stage: called for each step, with the loss so far.

  Returns:
    The best plan for each number of followers from 1 up; none if one follower already exceeds the budget.

  Raises:
    UserError: if there are too few layers, or an excluded layer does not exist.
  """
  budget = Budget("followers", budget) if isinstance(budget, int) else budget
  layers = judge.config.num_layers
  check_excluded(excluded, layers)
  free = sorted(set(range(1, layers)) - set(excluded))
  followers = budget.most(judge.config)
  if math.isinf(budget.nats):
    check_count(followers, len(free))
  kept = [judge.walk(SharingPlan.dense(layers), keep=True)]
  best: list[Found] = []
  while len(best) < min(followers, len(free)):
    parents = {
      SharingPlan.from_followers(layers, (*base.plan.followers, layer)): base
      for base in kept
      for layer in free
      if base.plan.is_anchor(layer)
    }
    parents = {plan: base for plan, base in parents.items() if fits(judge.config, plan)}
    if not parents and math.isinf(budget.nats):
      raise UserError(
        f"at most {len(best)} followers are possible: no remaining layer sees the same keys as its anchor"
      )
    candidates = list(parents)
    if shortlist is not None:
      costs = shortlist.costs
      candidates = sorted(candidates, key=lambda plan: plan_cost(plan, costs))[: shortlist.size]
    so_far = f", {math.exp(best[-1].increase):.3f} × with {len(best)}" if best else ""
    last = f" of {followers}" if math.isinf(budget.nats) else ""
    progress = stage(f"follower {len(best) + 1}{last}{so_far}")
    found = measured(judge, {plan: parents[plan] for plan in candidates}, progress)
    found.sort(key=lambda each: (each.increase, each.plan.source))
    if not found or found[0].increase > budget.nats:
      break
    best.append(found[0])
    if len(best) < followers:
      kept = [judge.walk(each.plan, parents[each.plan], keep=True) for each in found[:width]]
  return best


def check_count(followers: int, free: int) -> None:
  """Checks the number of followers against the number of layers that may follow.

  Raises:
    UserError: if there are too few layers.
  """
  if not free:
    raise UserError("no layer may follow: every layer that could is excluded (see `excluded`)")
  if followers > free:
    raise UserError(f"{followers} followers are impossible: only {free} layers may follow (see `excluded`)")


def check_excluded(excluded: Sequence[int], layers: int) -> None:
  """Checks that the excluded layers exist.

  Raises:
    UserError: if one does not.
  """
  if outside := [layer for layer in excluded if not 0 <= layer < layers]:
    raise UserError(f"there are no layers {outside} to exclude; the model has 0 to {layers - 1}")


def plan_cost(plan: SharingPlan, costs: np.ndarray) -> float:
  """Sum of the pair costs of a plan's followers."""
  return float(sum(costs[plan.source[layer], layer] for layer in plan.followers))


def cheapest(costs: np.ndarray, followers: int, excluded: Sequence[int] = ()) -> SharingPlan:
  """The plan with this many followers and the lowest sum of pair costs; arguments as in `each_cheapest`.

  Raises:
    UserError: if there is no such plan, or an excluded layer does not exist.
  """
  check_excluded(excluded, len(costs))
  check_count(followers, len(set(range(1, len(costs))) - set(excluded)))
  if len(plans := each_cheapest(costs, followers, excluded)) < followers:
    raise UserError(f"no plan has {followers} followers within the considered pairs: increase the reach")
  return plans[-1]


def each_cheapest(costs: np.ndarray, followers: int, excluded: Sequence[int] = ()) -> list[SharingPlan]:
  """The plans with 1, 2, … followers and the lowest sums of pair costs, by dynamic programming.

  Args:
    costs: ``[L, L]``: anchor, follower; infinite if not allowed.
    followers: maximum number of followers; the list ends at the number that the allowed pairs reach.
    excluded: layers that must stay anchors.

  Raises:
    UserError: if an excluded layer does not exist.
  """
  layers = len(costs)
  check_excluded(excluded, layers)
  allowed = costs.copy()
  allowed[:, list(excluded)] = np.inf
  # best[l][f]: lowest cost of layers before l with f followers, where l starts a group; and where that group starts.
  best = np.full((layers + 1, followers + 1), np.inf)
  origin = np.zeros((layers + 1, followers + 1), int)
  best[0, 0] = 0.0
  for anchor in range(layers):
    group = 0.0
    for end in range(anchor + 1, layers + 1):
      size = end - anchor - 1
      if size:
        group += allowed[anchor, end - 1]
      if size > followers or math.isinf(group):
        break
      for before in range(followers - size + 1):
        if best[anchor, before] + group < best[end, before + size]:
          best[end, before + size] = best[anchor, before] + group
          origin[end, before + size] = anchor

  def plan(followers: int) -> SharingPlan:
    source = [0] * layers
    end, left = layers, followers
    while end:
      anchor = int(origin[end, left])
      source[anchor:end] = [anchor] * (end - anchor)
      end, left = anchor, left - (end - anchor - 1)
    return SharingPlan(tuple(source))

  return [plan(count) for count in range(1, followers + 1) if math.isfinite(best[layers, count])]


def fits(config: ModelConfig, plan: SharingPlan) -> bool:
  """Whether the model can use the plan; see `sa_jax.nn.transformer.check_plan`."""
  try:
    check_plan(config, plan)
  except UserError:
    return False
  return True


def most_within(budget: Budget, followers: int, find: Callable[[int], Found]) -> Found:
  """Finds a plan with this many followers; or, if the budget limits the loss, with the most that stay within it.

  Args:
    budget: the budget.
    followers: maximum number of followers.
    find: returns the plan for a number of followers.

  Raises:
    UserError: if one follower already exceeds the budget.
  """
  if math.isinf(budget.nats):
    return find(followers)
  last: Found | None = None
  for count in range(1, followers + 1):
    try:
      found = find(count)
    except UserError:  # no plan has that many
      break
    if found.increase > budget.nats:
      break
    last = found
  return last or too_much(budget)


def too_much(budget: Budget) -> NoReturn:
  """Reports that a budget allows no follower.

  Raises:
    UserError: always.
  """
  raise UserError(f"with one follower the held-out loss already exceeds the budget of {budget}")


def late_spans(config: ModelConfig, followers: int) -> Iterator[SharingPlan]:
  """The paper's recipe: one contiguous span of followers, in the second half of the model if it fits there.

  Layers of a span whose visible keys differ from those of the layer before them stay anchors.
  """
  layers, free = config.num_layers, config.can_follow
  latest = len(free) - followers
  for first in range(latest + 1):
    if first == latest or free[first] > layers // 2:
      yield SharingPlan.from_followers(layers, free[first : first + followers])


def best_of(judge: Judge, plans: Sequence[SharingPlan], progress: Progress | None = None) -> Found:
  """The plan with the lowest loss.

  Raises:
    UserError: if there are no plans.
  """
  if not plans:
    raise UserError("there is no plan to choose from")
  return min(measured(judge, dict.fromkeys(plans), progress), key=lambda each: each.increase)


def improve(
  judge: Judge,
  start: Found,
  costs: np.ndarray,
  *,
  tries: int,
  excluded: Sequence[int] = (),
  progress: Progress | None = None,
) -> Found:
  """Local search: swaps one follower for another as long as that lowers the measured loss, cheapest swaps first.

  Args:
    judge: measures plans.
    start: the initial plan.
    costs: pair costs, which order the swaps.
    tries: maximum number of plans to measure.
    excluded: layers that must stay anchors.
    progress: called with (plans measured, tries).
  """
  layers, best, tried = judge.config.num_layers, start, {start.plan}
  for attempt in range(tries):
    followers = set(best.plan.followers)
    free = set(range(1, layers)) - followers - set(excluded)
    sets = (followers - {out} | {into} for out in followers for into in free)
    swaps = {SharingPlan.from_followers(layers, chosen) for chosen in sets} - tried
    swaps = {plan for plan in swaps if fits(judge.config, plan)}
    if not swaps:
      break
    plan = min(swaps, key=lambda plan: (plan_cost(plan, costs), plan.source))
    tried.add(plan)
    best = min(best, *measured(judge, {plan: None}), key=lambda each: each.increase)
    if progress is not None:
      progress(attempt + 1, tries)
  return best


def pareto(judge: Judge) -> list[Found]:
  """Pareto-optimal measured plans: no other has no fewer followers and a lower loss; in order of followers."""
  best: list[Found] = []
  by_count: dict[int, Found] = {}
  for plan, losses in judge.measured.items():
    found = Found(plan, losses, judge.increase(losses))
    count = len(plan.followers)
    if count not in by_count or found.increase < by_count[count].increase:
      by_count[count] = found
  for count in sorted(by_count, reverse=True):
    if not best or by_count[count].increase < best[-1].increase:
      best.append(by_count[count])
  return best[::-1]
