"""What a run counts: losses, tokens, seconds, and the share of its devices' peak rate."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.costs import cost
from sa_jax.plan import SharingPlan
from sa_jax.train.step import EXPERT_TOKENS

PEAK_TFLOPS = {
  "NVIDIA A100": 312.0,
  "NVIDIA H100": 989.0,
  "NVIDIA H200": 989.0,
  "TPU v4": 275.0,
  "TPU v5 lite": 197.0,
  "TPU v5p": 459.0,
  "TPU v5": 459.0,
  "TPU v6 lite": 918.0,
}
"""Dense bfloat16 rates that makers state, by the beginning of a device's name."""


def peak_tflops(stated: float | None) -> float | None:
  """The peak rate of one device: as stated, or else its known one."""
  name = jax.devices()[0].device_kind
  return stated or next((rate for start, rate in PEAK_TFLOPS.items() if name.startswith(start)), None)


def train_flops(config: ModelConfig, plan: SharingPlan, rows: int, length: int) -> int:
  """Model FLOPs of a step: forward, and twice that backward; nothing that is computed again counts."""
  return 3 * cost(config, plan, rows, length).flops


def of_routers(told: Mapping[str, np.ndarray]) -> dict[str, float]:
  """What a step's line says of a mixture of experts: its routers' losses, and how tokens are spread.

  ``expert_load_max`` and ``expert_load_min`` are the tokens of the fullest and the emptiest expert of any layer, over
  what each would have if all had the same: 1 is balanced.
  """
  values = {name: float(value) for name, value in told.items() if name != EXPERT_TOKENS}
  if (tokens := told.get(EXPERT_TOKENS)) is not None:
    relative = tokens / np.maximum(tokens.mean(axis=-1, keepdims=True), 1e-9)
    values |= {"expert_load_max": float(relative.max()), "expert_load_min": float(relative.min())}
  return values


@dataclasses.dataclass
class Window:
  """Sums over the steps since the last line of metrics.

  Attributes:
    loss: sum of losses of the tokens.
    weight: of how many tokens.
    seen: tokens learnt since training began.
    skipped: steps that changed nothing, since training began.
    in_row: how many of them just now.
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
    """The mean loss since the last call, NaN if there was none."""
    mean = self.loss / self.weight if self.weight else math.nan
    self.loss = self.weight = 0.0
    return mean


class Clock:
  """Seconds a step, without what is not training, and without the first step, which compiles."""

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
    """Takes time out of the count."""
    if self._since is not None:
      self._since += seconds

  def lap(self) -> float | None:
    """Seconds a step since the last call; None if none was counted."""
    if self._since is None or not self._steps:
      return None
    now = time.perf_counter()
    mean = (now - self._since) / self._steps
    self._since, self._steps = now, 0
    return mean
