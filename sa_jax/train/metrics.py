"""Metrics of a run: losses, tokens, time, and the fraction of the devices' peak rate."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.machine import PEAK_TFLOPS
from sa_jax.plan import SharingPlan
from sa_jax.train.step import EXPERT_TOKENS


def peak_tflops(stated: float | None) -> float | None:
  """The peak rate of one device: as given, or else the known one."""
  name = jax.devices()[0].device_kind
  return stated or next((rate for start, rate in PEAK_TFLOPS.items() if name.startswith(start)), None)


def train_flops(config: ModelConfig, plan: SharingPlan, rows: int, length: int) -> int:
  """Model FLOPs per step: the forward pass, and twice that for the backward pass, without recomputation."""
  return 3 * cost(config, plan, rows, length).flops


def of_routers(aux: Mapping[str, np.ndarray]) -> dict[str, float]:
  """A mixture of experts' metrics: router losses, and the balance of tokens.

  ``expert_load_max`` and ``expert_load_min`` are the tokens of the most and the least loaded expert of any layer,
  relative to an even distribution: 1 is balanced.
  """
  values = {name: float(value) for name, value in aux.items() if name != EXPERT_TOKENS}
  if (tokens := aux.get(EXPERT_TOKENS)) is not None:
    relative = tokens / np.maximum(tokens.mean(axis=-1, keepdims=True), 1e-9)
    values |= {"expert_load_max": float(relative.max()), "expert_load_min": float(relative.min())}
  return values


@dataclasses.dataclass
class Window:
  """Sums over the steps since the last line of metrics.

  Attributes:
    loss: sum of token losses.
    weight: number of tokens, or their total weight.
    seen: tokens trained on since training began.
    skipped: skipped steps since training began.
    in_row: number of consecutive skipped steps up to now.
  """

  loss: float = 0.0
  weight: float = 0.0
  seen: float = 0.0
  skipped: int = 0
  in_row: int = 0

  def add(self, loss: float, weight: float, finite: bool) -> None:
    """Counts a step."""
    if finite:
      self.loss += loss * weight
      self.weight += weight
      self.seen += weight
    self.skipped += not finite
    self.in_row = 0 if finite else self.in_row + 1

  def close(self) -> float:
    """The mean loss since the last call; NaN without any steps."""
    mean = self.loss / self.weight if self.weight else math.nan
    self.loss = self.weight = 0.0
    return mean


class Clock:
  """Seconds per step, without time outside training and without the first step, which compiles."""

  def __init__(self) -> None:
    self._since: float | None = None
    self._steps = 0

  def tick(self) -> None:
    """Counts a step."""
    if self._since is None:
      self._since = time.perf_counter()
    else:
      self._steps += 1

  def pause(self, seconds: float) -> None:
    """Excludes time from the count."""
    if self._since is not None:
      self._since += seconds

  def lap(self) -> float | None:
    """Seconds per step since the last call; None if none was counted."""
    if self._since is None or not self._steps:
      return None
    now = time.perf_counter()
    mean = (now - self._since) / self._steps
    self._since, self._steps = now, 0
    return mean
