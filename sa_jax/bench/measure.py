"""Timing on an accelerator, and the two ceilings to compare with: copy bandwidth and matrix rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
  """Seconds of one call, over several.

  Attributes:
    median: of the repeats.
    low: the fastest.
    high: the slowest.
  """

  median: float
  low: float
  high: float

  def scaled(self, factor: float) -> Timing:
    """The timing of a part of the call, or of several."""
    return Timing(*(value * factor for value in self))


def timed(call: Callable[[], Any], repeats: int = 10, warmup: int = 2) -> Timing:
  """Times a call to its end on the device; the first ``warmup`` calls compile and are not counted."""
  for _ in range(warmup):
    jax.block_until_ready(call())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  return Timing(statistics.median(seconds), min(seconds), max(seconds))


def copy_bandwidth(gigabytes: float = 4.0) -> float:
  """Bytes a second of a large copy on the device, bytes read plus bytes written."""
  count = int(gigabytes * 1e9) // 4
  loops = 8
  # A changing operand keeps XLA from eliding the copies; in-place addition reads and writes every byte once.
  step = jax.jit(lambda x: jax.lax.fori_loop(0, loops, lambda i, x: x + 1.0, x), donate_argnums=0)
  x = jnp.zeros(count, jnp.float32)

  def call() -> jax.Array:
    nonlocal x
    x = step(x)
    return x

  return 2 * 4 * count * loops / timed(call).median


def matrix_rate(size: int = 8192) -> float:
  """FLOP/s of a large bfloat16 matrix product of random operands."""
  keys = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
  product = jax.jit(lambda a, b: a @ b)
  return 2 * size**3 / timed(lambda: product(a, b), repeats=20).median


def device_name() -> str:
  """The accelerator's own name."""
  return jax.devices()[0].device_kind


H100_PEAK = 989e12
"""Dense bfloat16 FLOP/s in the H100 SXM's data sheet; what model FLOPs utilisation (MFU) is stated against."""


def training_rate(tokens: int, flops: float, seconds: float) -> str:
  """Tokens a second and MFU, as text."""
  return f"{tokens / seconds:,.0f} tokens/s, MFU {100 * flops / seconds / H100_PEAK:.1f} % of 989 TFLOP/s"
