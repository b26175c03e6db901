"""Rows to batches on devices: each epoch in a new order, the same for any number of hosts; positions can be saved."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from sa_jax.errors import UserError
from sa_jax.nn.axes import mesh_axes_of
from sa_jax.train.batch import Batch
from sa_jax.train.data.packing import PackedRows


class BatchIterator(Protocol):
  """A grain iterator over batches of this host's rows; its state says at which batch it is."""

  def __next__(self) -> Batch: ...

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON values."""
    ...

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position."""
    ...


def shuffled(rows: PackedRows, batch_size: int, seed: int, mine: Sequence[int], threads: int = 2) -> BatchIterator:
  """Batches without end; every row comes once an epoch, in an order that seed and epoch decide.

  The order is that of whole batches, so the position means the same on any number of hosts; a host reads only the rows
  that its devices hold.

  Args:
    rows: all rows.
    batch_size: of the global batch, ``B``.
    seed: of the order.
    mine: which of a batch's rows this host holds; see `host_rows`.
    threads: that read ahead.

  Raises:
    UserError: if grain, or something that it needs, is not installed.
  """
  grain = grain_package()
  # As good as without end: grain counts rows, batches and what it reads ahead in 64 bits.
  epochs = (1 << 60) // len(rows)
  numbers = grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat(epochs).batch(batch_size)
  batches = numbers.map(lambda batch: rows.read(batch[list(mine)]))
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def grain_package() -> ModuleType:
  """The package grain, which is in the extra ``train``.

  Raises:
    UserError: if it, or something that it needs, is not installed.
  """
  try:
    return importlib.import_module("grain")
  except ImportError as error:
    raise UserError(f"training reads data with grain ({error}): pip install 'sa-jax[train]'") from None


def every_row_once(rows: PackedRows, batch_size: int, mine: Sequence[int], limit: int | None = None) -> Iterator[Batch]:
  """Every row once, for evaluation; the last batch is filled with padding.

  Args:
    rows: all rows.
    batch_size: of the global batch, ``B``.
    mine: which of a batch's rows this host holds.
    limit: at most this many batches.
  """
  count = -(-len(rows) // batch_size)
  for batch in range(count if limit is None else min(count, limit)):
    numbers = np.arange(batch * batch_size, (batch + 1) * batch_size)
    yield rows.read(np.where(numbers < len(rows), numbers, -1)[list(mine)].tolist())


def host_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
  """Which rows of a global batch the devices of this host hold.

  Args:
    sharding: of the batch, ``[B, T]``.
    batch_size: ``B``.

  Raises:
    UserError: if the mesh does not divide the batch.
  """
  parts = sharding.mesh.shape
  axes = sharding.spec[0] if len(sharding.spec) else None
  shards = math.prod(parts[axis] for axis in mesh_axes_of(axes))
  if batch_size % shards:
    ways = " × ".join(f"{axis} {parts[axis]}" for axis in mesh_axes_of(axes) if parts[axis] > 1)
    raise UserError(f"a batch of {batch_size} rows does not divide over {shards} shards: {ways} of the mesh")
  # Lengths differ between callers, rows do not: one token a row is enough to ask with.
  by_rows = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(axes))
  indices: Any = by_rows.addressable_devices_indices_map((batch_size,)).values()
  return sorted({row for (part,) in indices for row in range(*part.indices(batch_size))})


def to_devices(batch: Batch, sharding: NamedSharding, batch_size: int) -> Batch:
  """This host's rows as global arrays ``[B, T]``."""

  def place(rows: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

  return jax.tree.map(place, batch)
