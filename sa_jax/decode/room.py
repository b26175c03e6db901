"""Whether a cache fits in memory, before anything is allocated."""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from sa_jax import machine
from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer


def check_room(rows: int, capacity: int, mesh: Mesh | None, *models: Transformer) -> None:
  """Checks that the models' caches are not larger than total memory: XLA aborts the process if sizes overflow.

  Args:
    rows: rows in the batch.
    capacity: slots per row.
    mesh: the devices that hold the caches; None for one device.
    models: the models whose caches exist at the same time.

  Raises:
    UserError: if they are.
  """
  shapes = jax.eval_shape(lambda: [Cache.empty(model.config, model.plan, rows, capacity) for model in models])
  needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
  devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
  if (have := _memory(devices)) is not None and needed > have:
    what, take = ("a cache", "takes") if len(models) == 1 else (f"{len(models)} caches", "take")
    raise UserError(
      f"{what} of {rows} rows of {capacity:,} tokens {take} {needed / 1e9:,.1f} GB, but there are only "
      f"{have / 1e9:,.1f}: use fewer rows or tokens"
    )


def _memory(devices: list[jax.Device]) -> int | None:
  """Total bytes of the devices; None if unknown."""
  if devices[0].platform == "cpu":  # all CPU devices share one memory
    return machine.memory()
  try:
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  except jax.errors.JaxRuntimeError:  # not attached: only compiled for
    return None
  return None if limit is None else int(limit) * len(devices)
