"""Timing on an accelerator, and two ceilings to compare with: copy bandwidth and matrix multiplication rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sa_jax.machine import PEAK_TFLOPS


class Timing(NamedTuple):
  """Time of one call in seconds, over repeats.

  Attributes:
    median: the median.
    low: the fastest.
    high: the slowest.
  """

  median: float
  low: float
  high: float

  def scaled(self, factor: float) -> Timing:
    """The timing of a fraction or a multiple of the call."""
    return Timing(*(value * factor for value in self))


def timed(
  call: Callable[[], Any],
  repeats: int = 10,
  warmup: int = 2,
  wait: Callable[[Any], object] = jax.block_until_ready,
) -> Timing:
  """Times a call until its result is ready on the device.

  Args:
    call: its result is waited for.
    repeats: timed calls.
    warmup: untimed calls before them, which compile.
    wait: waits for a result.

  Returns:
    Median, fastest and slowest, in seconds.
  """
  for _ in range(warmup):
    wait(call())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    wait(call())
    seconds.append(time.perf_counter() - start)
  return Timing(statistics.median(seconds), min(seconds), max(seconds))


def copy_bandwidth(gigabytes: float = 4.0, mesh: Mesh | None = None) -> float:
  """Bytes per second of a large copy on the device, bytes read plus bytes written.

  On a mesh, all devices copy simultaneously, ``gigabytes`` each; their bytes are summed.
  """
  count = int(gigabytes * 1e9) // 4 * _devices(mesh)
  loops = 8
  # A changing operand keeps XLA from eliding the copies; in-place addition reads and writes each byte once.
  step = jax.jit(lambda x: jax.lax.fori_loop(0, loops, lambda i, x: x + 1.0, x), donate_argnums=0)
  x = jax.jit(lambda: jnp.zeros(count, jnp.float32), out_shardings=_each_its_own(mesh))()

  def call() -> jax.Array:
    nonlocal x
    x = step(x)
    return x

  return 2 * 4 * count * loops / timed(call).median


def matrix_rate(size: int = 8192, mesh: Mesh | None = None) -> float:
  """FLOP/s of a large bfloat16 matrix product of random operands; on a mesh, of one per device simultaneously."""
  count = _devices(mesh)
  shape = (size, size) if mesh is None else (count, size, size)
  fill = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16), out_shardings=_each_its_own(mesh))
  a, b = (fill(key) for key in jax.random.split(jax.random.key(0)))
  product = jax.jit(lambda a, b: a @ b)
  return count * 2 * size**3 / timed(lambda: product(a, b), repeats=20).median


def _devices(mesh: Mesh | None) -> int:
  return 1 if mesh is None else mesh.size


def _each_its_own(mesh: Mesh | None) -> NamedSharding | None:
  """A sharding that splits the first axis over all devices."""
  return None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def device_name(mesh: Mesh | None = None) -> str:
  """The accelerator's name, and the number of devices in the mesh."""
  name = jax.devices()[0].device_kind
  return name if mesh is None else f"{mesh.size} × {name}"


H100_PEAK = 1e12 * PEAK_TFLOPS["NVIDIA H100"]
"""Model FLOPs utilisation (MFU) is relative to this many FLOP/s."""


def training_rate(tokens: int, flops: float, seconds: float, devices: int = 1) -> str:
  """Tokens per second and MFU, as text; for several devices, also per device."""
  rate, mfu = tokens / seconds, flops / seconds / (devices * H100_PEAK)
  each = "" if devices == 1 else f" ({rate / devices:,.0f} a device)"
  return f"{rate:,.0f} tokens/s{each}, MFU {100 * mfu:.1f} % of {'' if devices == 1 else f'{devices} × '}989 TFLOP/s"
