"""What a program of Hopper's decode kernels has in shared memory and in registers (Pallas Mosaic GPU).

Slots are the rows of its arrays, and queries their columns, as `hopper_decode` tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.typing import DTypeLike

from sa_jax.ops.attention.hopper_kernels import _INDEX
from sa_jax.ops.quantize import Quantised, Stored
from sa_jax.trees import Tree


class Side(NamedTuple):
  """Keys or values of a program's head. Vectors in int8 have scales, and are made wider before a product reads them.

  Attributes:
    cached: a head's vectors ``[S, H]``, and their scales ``[S]`` or None, in the GPU's memory.
    new: a new token's, ``[H]`` and ``[1]``.
    first: the program's first slot.
    token: the new token's vector, in shared memory as all below.
    here: barriers that tell when a block has come.
    ring: blocks on their way.
    scales: those of the blocks, or None.
    widened: a block as products read it, or None.
  """

  cached: tuple[Tree, Tree | None]
  new: tuple[Tree, Tree | None]
  first: jax.Array
  token: Tree
  here: Tree
  ring: Tree
  scales: Tree | None = None
  widened: Tree | None = None

  def fetch(self, index: jax.Array | int) -> None:
    """Has a block on its way to its place in the ring."""
    stages, block = self.ring.shape[:2]
    slot, slots = jax.lax.rem(index, stages), pl.ds(self.first + index * block, block)
    for cached, ring in zip(self.cached, (self.ring, self.scales), strict=True):
      if ring is not None:
        mosaic.copy_gmem_to_smem(cached.at[slots], ring.at[slot], self.here.at[slot])

  def read(self, slot: jax.Array) -> Tree:
    """A block that has come, for a product."""
    if self.widened is None:
      return self.ring.at[slot]
    numbers = mosaic.load(self.ring.at[slot], *_INDEX, layout=mosaic.Layout.WGMMA_UPCAST_2X)
    self.widened[...] = mosaic.layout_cast(numbers.astype(self.widened.dtype), mosaic.Layout.WGMMA)
    mosaic.commit_smem()
    return self.widened

  def times_scales(self, products: jax.Array, slot: jax.Array) -> jax.Array:
    """Products ``[slots, queries]`` with a block's vectors, or weights for them, times its scales."""
    return products if self.scales is None else products * of_all_queries(self.scales.at[slot], products.shape[1])

  def write(self, new: jax.Array) -> None:
    """The new token's vector into its slot, counted from the program's first."""
    mosaic.copy_smem_to_gmem(self.token, self.cached[0].at[self.first + new])
    (_, scales), (_, scale) = self.cached, self.new
    if scales is not None and scale is not None:
      scales[self.first + new] = scale[0]

  def floats(self, columns: int) -> jax.Array:
    """The new token's vector ``[H, queries]``, the same for each query."""
    numbers = of_all_queries(self.token, columns)
    return numbers if self.new[1] is None else numbers * self.new[1][0]


def side_memory(stored: Stored, ring: tuple[int, int, int], dtype: DTypeLike) -> tuple[Tree, ...]:
  """The shared memory of a `Side`, whose products are in this dtype."""
  (stages, block, width), quantised = ring, isinstance(stored, Quantised)
  data = jnp.int8 if quantised else dtype
  token, here = mosaic.SMEM((width,), data), mosaic.Barrier(num_arrivals=1 + quantised, num_barriers=stages)
  plain = token, here, shared_memory(data, *ring)
  return (*plain, mosaic.SMEM((stages, block), jnp.float32), shared_memory(dtype, block, width)) if quantised else plain


def of_a_head(refs: tuple[Tree, Tree | None], row: jax.Array, head: jax.Array) -> tuple[Tree, Tree | None]:
  """What of vectors ``[B, K, …]``, and of their scales or None, a row's key head has."""
  data, scales = refs
  return data.at[row, head], None if scales is None else scales.at[row, head]


Fetch = Callable[[jax.Array | int], None]
"""Has a block, by its index, on its way to its place in a ring."""


def start_fetching(fetches: tuple[Fetch, ...], stages: int, blocks: jax.Array) -> None:
  """Has the first blocks on their way, as many as there are places for."""
  for index in range(stages):

    @pl.when(index < blocks)
    def _(index: int = index) -> None:
      for fetch in fetches:
        fetch(index)


def columns_of(ref: Tree) -> jax.Array:
  """Rows in shared memory, transposed, in a warpgroup's registers."""
  layout = mosaic.Layout.WGMMA_TRANSPOSED
  return mosaic.load(ref.transpose((1, 0)), *_INDEX, layout=layout, optimized=False)


def store_columns(x: jax.Array, ref: Tree) -> None:
  """Weights ``[slots, queries]`` into shared memory, as columns for a product."""
  narrow = x.astype(ref.dtype)
  ref.transpose((1, 0))[...] = mosaic.layout_cast(narrow, mosaic.Layout.WGMMA_TRANSPOSED)
  mosaic.commit_smem()


def product(a: Tree, b: Tree) -> jax.Array:
  """Of two arrays in shared memory, in a warpgroup's registers."""

  def within(ref: Tree) -> jax.Array:
    mosaic.wgmma(ref, a, b)
    return ref[...]

  return pl.run_scoped(within, mosaic.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def filled(number: float, *shape: int) -> jax.Array:
  """The same number everywhere, ``[rows, queries]``."""
  return mosaic.layout_cast(jnp.full(shape, number, jnp.float32), mosaic.Layout.WGMMA)


def slots_of(*shape: int) -> jax.Array:
  """The slot of each score of a block."""
  return mosaic.broadcasted_iota(jnp.int32, shape, 0, layout=mosaic.Layout.WGMMA)


def of_all_slots(of_queries: jax.Array, rows: int) -> jax.Array:
  """What there is one of a query, the same for so many rows."""
  return jax.lax.broadcast_in_dim(of_queries, (rows, *of_queries.shape), [1])


def of_all_queries(ref: Tree, columns: int) -> jax.Array:
  """A head's numbers in shared memory, the same for each query."""
  of_numbers = mosaic.load(ref, *_INDEX, layout=mosaic.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)
  return jax.lax.broadcast_in_dim(of_numbers, (*ref.shape, columns), [0])


def shared_memory(dtype: DTypeLike, *shape: int) -> Tree:
  """Shared memory as the tensor cores read it, in rows of 128 bytes if there are so many."""
  size = jnp.dtype(dtype).itemsize
  row = min(128, shape[-1] * size)
  return mosaic.SMEM(shape, dtype, transforms=(mosaic.TilingTransform((8, row // size)), mosaic.SwizzleTransform(row)))
