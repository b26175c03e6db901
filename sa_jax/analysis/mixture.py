"""Meeting a budget of cache bytes with followers, narrower values, int8 or int4, or a mixture.

Which mixtures fit is computed; which loses least is measured after recovery. Single methods are among the candidates,
so a mixture is chosen only if its held-out loss is lower than theirs.
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
"""Sizes of values to try, in fractions 1/8 of a head."""


class Mixture(NamedTuple):
  """What shrinks a cache.

  Attributes:
    plan: its followers cache no keys.
    value_dim: size of a head's values; None for that of its keys.
    cache_dtype: as in `ModelConfig`.
  """

  plan: SharingPlan
  value_dim: int | None = None
  cache_dtype: CacheDtype = None

  def config(self, config: ModelConfig) -> ModelConfig:
    """The model's config with the mixture applied; what the mixture leaves alone stays as it is."""
    value_dim = config.value_dim if self.value_dim is None else self.value_dim
    return dataclasses.replace(config, value_dim=value_dim, cache_dtype=self.cache_dtype or config.cache_dtype)

  def part(self, config: ModelConfig) -> float:
    """The remaining fraction of this dense model's bfloat16 cache."""
    config = dataclasses.replace(config, dtype="bfloat16", cache_dtype=None)
    of = lambda config, plan: cost(config, plan).kv_bytes_per_token
    return of(self.config(config), self.plan) / of(config, None)

  def __str__(self) -> str:
    """For example ``8 followers, values of 48, int8``."""
    followers = len(self.plan.followers)
    parts = [f"{followers} follower{'s' if followers > 1 else ''}"] if followers else []
    parts += [f"values of {self.value_dim}"] if self.value_dim is not None else []
    return ", ".join([*parts, *([self.cache_dtype] if self.cache_dtype else [])]) or "dense"


def within(config: ModelConfig, budget: Budget, plans: Sequence[SharingPlan]) -> list[Mixture]:
  """The mixtures within a budget: for each cache dtype, each plan with the largest values that fit.

  Plans with more followers but no wider values than another are left out.

  Args:
    config: the dense model.
    budget: the fraction of its cache to keep, and the allowed methods.
    plans: candidates, without head maps, in order of followers.

  Raises:
    UserError: if nothing fits.
  """
  width = config.value_width
  step = max(1, width // _STEPS)
  widths = [width, *(range(width - step, 0, -step) if "values" in budget.allow else [])]
  quantised: tuple[CacheDtype, ...] = ("int8", "int4")
  dtypes = (None, *(each for each in quantised if each in budget.allow))
  found, least = [], math.inf
  for cache_dtype in dtypes:
    widest, together = 0, 1 if cache_dtype is None else FORMATS[cache_dtype].per_byte
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
    raise UserError(
      f"kv cannot be reduced to {budget.amount:.1%} by {', '.join(budget.allow)}: the minimum is {least:.1%}"
    )
  return found


def increases(judge: Judge, mixtures: Sequence[Mixture], progress: Progress) -> dict[Mixture, float]:
  """The increase of the loss for each mixture, mean over texts, in nats, lowest first.

  The cost of a quantised cache is measured once, on the dense model, and added.
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
  """How each method reduces the bytes per token of a bfloat16 cache, and the remaining bytes."""
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
