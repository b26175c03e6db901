"""One budget of cache bytes, and what meets it: followers, narrower values, int8 or int4, or some of each.

Which mixtures fit is counted; which of them loses least is measured, with the recovery that they would get. The means
by themselves are among them, so that a mixture is taken only where it is judged better than each of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sa_jax.analysis.budget import Budget
from sa_jax.analysis.judge import Judge
from sa_jax.config import CacheDtype, ModelConfig
from sa_jax.costs import cost
from sa_jax.display import Progress
from sa_jax.errors import UserError
from sa_jax.ops import FORMATS
from sa_jax.plan import SharingPlan

_STEPS = 8
"""Widths of values that are tried: so many parts of a head."""


class Mixture(NamedTuple):
  """What a cache is made smaller by.

  Attributes:
    plan: whose followers cache no keys.
    value_dim: how many numbers a head's values have; as many as its keys when None.
    cache_dtype: as in `ModelConfig`.
  """

  plan: SharingPlan
  value_dim: int | None = None
  cache_dtype: CacheDtype = None

  def config(self, config: ModelConfig) -> ModelConfig:
    """The model's config with it."""
    value_dim = config.value_dim if self.value_dim is None else self.value_dim
    return dataclasses.replace(config, value_dim=value_dim, cache_dtype=self.cache_dtype)

  def part(self, config: ModelConfig) -> float:
    """What is left of the cache, in bfloat16, of the dense model of this config."""
    config = dataclasses.replace(config, dtype="bfloat16", cache_dtype=None)
    of = lambda config, plan: cost(config, plan).kv_bytes_per_token
    return of(self.config(config), self.plan) / of(config, None)

  def __str__(self) -> str:
    """Such as ``8 followers, values of 48, int8``."""
    followers = len(self.plan.followers)
    parts = [f"{followers} follower{'s' if followers > 1 else ''}"] if followers else []
    parts += [f"values of {self.value_dim}"] if self.value_dim is not None else []
    return ", ".join([*parts, *([self.cache_dtype] if self.cache_dtype else [])]) or "dense"


def within(config: ModelConfig, budget: Budget, plans: Sequence[SharingPlan]) -> list[Mixture]:
  """The mixtures within a budget: in each type of cache, each plan with the widest values that it leaves room for.

  Plans with more followers than a plan with values as wide are left out.

  Args:
    config: the dense model.
    budget: what may remain of its cache, and by what means.
    plans: that may be taken, without maps, the fewest followers first.

  Raises:
    UserError: if there is none.
  """
  width = config.value_width
  step = max(1, width // _STEPS)
  widths = [width, *(range(width - step, 0, -step) if "values" in budget.allow else [])]
  quantised: tuple[CacheDtype, ...] = ("int8", "int4")
  dtypes = (None, *(each for each in quantised if each in budget.allow))
  found, least = [], math.inf
  for cache_dtype in dtypes:
    widest, together = 0, 1 if cache_dtype is None else FORMATS[cache_dtype].a_byte
    for plan in (SharingPlan.dense(config.num_layers), *(plans if "sharing" in budget.allow else [])):
      for value_dim in (each for each in widths if each % together == 0):
        mixture = Mixture(plan, None if value_dim == width else value_dim, cache_dtype)
        part = mixture.part(config)
        least = min(least, part)
        if part <= budget.amount * (1 + 1e-9):
          if value_dim > widest:
            found.append(mixture)
            widest = value_dim
          break
  if not found:
    raise UserError(f"nothing reduces kv to {budget.amount:.1%} by {', '.join(budget.allow)}: the least is {least:.1%}")
  return found


def judged(judge: Judge, mixtures: Sequence[Mixture], progress: Progress) -> dict[Mixture, float]:
  """By how much each raises the loss, mean over texts, in nats: the least first.

  What a quantised cache costs is measured once, on the dense model, and added.
  """
  dtypes = dict.fromkeys(mixture.cache_dtype for mixture in mixtures)
  rounding = {each: 0.0 if each is None else judge.increase(judge.rounded(each)) for each in dtypes}
  found: dict[Mixture, float] = {}
  for index, mixture in enumerate(mixtures):
    losses = judge.losses(mixture.plan, value_dim=mixture.value_dim)
    found[mixture] = judge.increase(losses) + rounding[mixture.cache_dtype]
    progress(index + 1, len(mixtures))
  return dict(sorted(found.items(), key=lambda item: item[1]))


def bytes_of(config: ModelConfig, mixture: Mixture) -> Mapping[str, int]:
  """Where the bytes that a token's cache took in bfloat16 have gone, and what is left."""
  config = dataclasses.replace(config, dtype="bfloat16", cache_dtype=None)
  steps = {
    "followers' keys": Mixture(mixture.plan),
    "narrower values": Mixture(mixture.plan, mixture.value_dim),
    mixture.cache_dtype or "bfloat16": mixture,
  }
  left = cost(config, None).kv_bytes_per_token
  gone = {}
  for name, step in steps.items():
    after = cost(step.config(config), step.plan).kv_bytes_per_token
    gone[name], left = left - after, after
  return gone | {"left": left}
