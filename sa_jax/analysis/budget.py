"""Budgets: a number of followers, a fraction of the dense cost, or a limit on perplexity."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.errors import UserError
from sa_jax.fields import check_fields
from sa_jax.plan import SharingPlan

Measure = Literal["followers", "kv", "flops", "ppl"]
Means = Literal["sharing", "values", "int8", "int4"]
_FORMS = "a number of followers, 'kv=80%', 'flops=95%', 'ppl=1.05'"


@dataclasses.dataclass(frozen=True)
class Budget:
  """A budget.

  Attributes:
    measure: ``followers``; ``kv`` and ``flops``, a fraction of the dense model's KV cache or forward pass; ``ppl``, a
      multiple of the dense model's perplexity on the held-out rows, in the geometric mean over texts.
    amount: the number.
    allow: for ``kv``, the methods that may shrink the cache: ``sharing``, narrower ``values``, ``int8``, ``int4``.

  Raises:
    UserError: if the amount is out of range, or methods other than sharing are allowed for a measure other than ``kv``.
  """

  measure: Measure
  amount: float
  allow: tuple[Means, ...] = ("sharing",)

  def __post_init__(self) -> None:
    check_fields(self, "budget")
    amount = self.amount
    if self.measure == "followers" and not (amount >= 1 and amount == int(amount)):
      raise UserError(f"{amount:.12g} followers are impossible: give a whole number, at least 1")
    if self.measure in ("kv", "flops") and not 0 < amount < 1:
      raise UserError(f"{self} is not a fraction of the dense model: give a value between 0 % and 100 %")
    if self.measure != "kv" and self.allow != ("sharing",):
      raise UserError(f"allow={' '.join(self.allow)} shrinks caches: it needs a budget such as kv=75%, not {self}")
    if not self.allow:
      raise UserError(f"allow is empty; choose at least one of {', '.join(get_args(Means))}")
    if self.measure == "ppl" and not amount > 1:
      raise UserError(f"ppl={amount:.12g} must exceed 1: it is relative to the dense model's perplexity, such as 1.05")

  @classmethod
  def parse(cls, text: str) -> Budget:
    """Reads ``8`` or ``followers=8``, ``kv=80%``, ``flops=95%``, ``ppl=1.05``.

    Raises:
      UserError: if the text has a different form.
    """
    name, _, value = text.strip().partition("=")
    if not value:
      name, value = "followers", name
    number = value.removesuffix("%")
    is_share = name in ("kv", "flops")
    if name not in ("followers", "kv", "flops", "ppl") or is_share != value.endswith("%"):
      raise UserError(f"the budget {text!r} is none of: {_FORMS}")
    try:
      amount = float(number)
    except ValueError:
      raise UserError(f"the budget {text!r} is none of: {_FORMS}") from None
    return cls(name, amount / 100 if is_share else amount)  # type: ignore[arg-type]

  def __str__(self) -> str:
    if self.measure == "followers":
      return f"{self.amount:.12g} followers"
    return (
      f"{self.measure}={self.amount:.12g}" if self.measure == "ppl" else f"{self.measure}={100 * self.amount:.12g}%"
    )

  @property
  def nats(self) -> float:
    """The allowed increase of the loss; infinite if the budget does not limit it."""
    return math.log(self.amount) if self.measure == "ppl" else math.inf

  def counted(self, config: ModelConfig, seq_len: int) -> Budget:
    """The budget as a number of followers, with FLOPs for ``seq_len`` tokens; unchanged if it limits the loss.

    Raises:
      UserError: see `most`.
    """
    return self if self.measure == "ppl" else Budget("followers", self.most(config, seq_len))

  def most(self, config: ModelConfig, seq_len: int = 1024) -> int:
    """The maximum number of followers, or the required number if the budget does not limit the loss.

    Args:
      config: the model.
      seq_len: number of tokens, for FLOPs.

    Raises:
      UserError: if no plan can meet the budget.
    """
    able, most = config.can_follow, len(config.can_follow)
    if config.num_layers == 1:
      raise UserError("a model of one layer has no layer that can follow: sharing needs two or more")
    if not able:
      raise UserError(
        f"no layer of the model can follow: each sees other keys than the layer before it (of {config.num_layers} "
        f"layers, {list(config.local_layers)} are local)"
      )
    if self.measure == "ppl":
      return most
    if self.measure == "followers":
      if self.amount > most:
        raise UserError(
          f"{self.amount:.12g} followers are impossible: a model of {config.num_layers} layers can have 1 to {most}"
          + (", which see the same keys as the layer before them" if most < config.num_layers - 1 else "")
        )
      return int(self.amount)
    measure = {"kv": "kv_cache_bytes", "flops": "flops"}[self.measure]
    of = lambda count: getattr(
      cost(config, SharingPlan.from_followers(config.num_layers, able[:count]), 1, seq_len), measure
    )
    for count in range(most + 1):
      if of(count) <= self.amount * of(0) * (1 + 1e-9):
        return max(count, 1)
    raise UserError(
      f"no plan reduces {self.measure} to {self.amount:.1%} of the dense model's: with {most} followers it is "
      f"{of(most) / of(0):.1%}"
    )
