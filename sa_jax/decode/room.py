"""Whether a cache has room in memory, before anything is allocated."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from sa_jax import machine
from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer


def check_room(model: Transformer, rows: int, capacity: int, mesh: Mesh | None) -> None:
  """Checks that a cache is not larger than all memory: XLA ends the process where sizes overflow.

  Args:
    model: whose cache.
    rows: at once.
    capacity: slots a row.
    mesh: the devices that share it; None for one.

  Raises:
    UserError: if it is.
  """
  shapes = jax.eval_shape(lambda: Cache.empty(model.config, model.plan, rows, capacity))
  needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
  if (have := _memory(devices)) is not None and needed > have:
    raise UserError(
      f"a cache of {rows} rows of {capacity:,} tokens takes {needed / 1e9:,.1f} GB, and there are {have / 1e9:,.1f}: "
      "fewer rows or tokens are needed"
    )


def _memory(devices: list[jax.Device]) -> int | None:
  """Bytes of the devices together; None where they do not say."""
  if devices[0].platform == "cpu":  # all that there are share one memory
    return machine.memory()
  try:
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  except jax.errors.JaxRuntimeError:  # a device that is elsewhere, which programs are only compiled for
    return None
  return None if limit is None else int(limit) * len(devices)
