"""Whether a cache has room in memory, before anything is allocated."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from sa_jax import machine
from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer


def check_room(rows: int, capacity: int, mesh: Mesh | None, *models: Transformer) -> None:
  """Checks that the caches of models are not larger than all memory: XLA ends the process where sizes overflow.

  Args:
    rows: at once.
    capacity: slots a row.
    mesh: the devices that share them; None for one.
    models: whose caches there are at once.

  Raises:
    UserError: if they are.
  """
  shapes = jax.eval_shape(lambda: [Cache.empty(model.config, model.plan, rows, capacity) for model in models])
  needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
  if (have := _memory(devices)) is not None and needed > have:
    what, take = ("a cache", "takes") if len(models) == 1 else (f"{len(models)} caches", "take")
    raise UserError(
      f"{what} of {rows} rows of {capacity:,} tokens {take} {needed / 1e9:,.1f} GB, and there are {have / 1e9:,.1f}: "
      "use fewer rows or tokens"
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
