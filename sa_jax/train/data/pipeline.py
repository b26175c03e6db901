"""Batches on devices: reshuffled each epoch, the same for any number of hosts, with a position that can be saved."""

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
  """A grain iterator over batches of this host's rows; its state is its position."""

  def __next__(self) -> Batch: ...

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON values."""
    ...

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position."""
    ...


def shuffled(rows: PackedRows, batch_size: int, seed: int, mine: Sequence[int], threads: int = 2) -> BatchIterator:
  """Endless batches; every row occurs once per epoch, in an order that depends on seed and epoch.

  Whole batches are ordered, so that a position means the same for any number of hosts; a host reads only its devices'
  rows.

  Args:
    rows: all rows.
    batch_size: global batch size, ``B``.
    seed: seed of the order.
    mine: which rows of a batch this host holds; see `host_rows`.
    threads: number of prefetching threads.

  Raises:
    UserError: if grain or one of its dependencies is not installed.
  """
  grain = grain_package()
  # Practically endless: grain counts rows, batches and prefetched elements in 64 bits.
  epochs = (1 << 60) // len(rows)
  numbers = grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat(epochs).batch(batch_size)
  batches = numbers.map(lambda batch: rows.read(batch[list(mine)]))
  return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def grain_package() -> ModuleType:
  """The package grain, part of the extra ``train``.

  Raises:
    UserError: if it or one of its dependencies is not installed.
  """
  try:
    return importlib.import_module("grain")
  except ImportError as error:
    raise UserError(f"training reads data with grain ({error}): pip install 'sa-jax[train]'") from None


def every_row_once(rows: PackedRows, batch_size: int, mine: Sequence[int], limit: int | None = None) -> Iterator[Batch]:
  """Every row once, for evaluation; the last batch is padded.

  Args:
    rows: all rows.
    batch_size: global batch size, ``B``.
    mine: which rows of a batch this host holds.
    limit: maximum number of batches.
  """
  count = -(-len(rows) // batch_size)
  for batch in range(count if limit is None else min(count, limit)):
    numbers = np.arange(batch * batch_size, (batch + 1) * batch_size)
    yield rows.read(np.where(numbers < len(rows), numbers, -1)[list(mine)].tolist())


def host_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
  """The indices of a global batch's rows that this host's devices hold.

  Args:
    sharding: the batch's sharding, ``[B, T]``.
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
  # Only rows matter here, not the length: query the sharding with one token per row.
  by_rows = NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(axes))
  indices: Any = by_rows.addressable_devices_indices_map((batch_size,)).values()
  return sorted({row for (part,) in indices for row in range(*part.indices(batch_size))})


def to_devices(batch: Batch, sharding: NamedSharding, batch_size: int) -> Batch:
  """This host's rows as global arrays ``[B, T]``."""

  def place(rows: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))

  return jax.tree.map(place, batch)
