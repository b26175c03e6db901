"""Shared memory and registers of the Hopper decode kernels (Pallas Mosaic GPU).

Rows of the arrays are cache slots and columns are queries; see `hopper_decode`.
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
  """Keys or values of a program's head. Int8 vectors have scales, and are widened before a product reads them.

  Attributes:
    cached: a head's vectors ``[S, H]``, and their scales ``[S]`` or None, in global memory.
    new: a new token's, ``[H]`` and ``[1]``.
    first: the program's first slot.
    token: the new token's vector, in shared memory like all fields below.
    here: barriers that signal the arrival of a block.
    ring: ring buffer of blocks.
    scales: scales of these blocks, or None.
    widened: a block in the dtype of the products, or None.
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
    """Starts the copy of a block into the ring buffer."""
    stages, block = self.ring.shape[:2]
    slot, slots = jax.lax.rem(index, stages), pl.ds(self.first + index * block, block)
    for cached, ring in zip(self.cached, (self.ring, self.scales), strict=True):
      if ring is not None:
        mosaic.copy_gmem_to_smem(cached.at[slots], ring.at[slot], self.here.at[slot])

  def read(self, slot: jax.Array) -> Tree:
    """A block that has arrived, in the dtype of the products."""
    if self.widened is None:
      return self.ring.at[slot]
    numbers = mosaic.load(self.ring.at[slot], *_INDEX, layout=mosaic.Layout.WGMMA_UPCAST_2X)
    self.widened[...] = mosaic.layout_cast(numbers.astype(self.widened.dtype), mosaic.Layout.WGMMA)
    mosaic.commit_smem()
    return self.widened

  def times_scales(self, products: jax.Array, slot: jax.Array) -> jax.Array:
    """Scales ``[slots, queries]``: products with a block's vectors, or weights of them."""
    return products if self.scales is None else products * of_all_queries(self.scales.at[slot], products.shape[1])

  def write(self, new: jax.Array) -> None:
    """Writes the new token's vector into its slot, which is relative to the program's first."""
    mosaic.copy_smem_to_gmem(self.token, self.cached[0].at[self.first + new])
    (_, scales), (_, scale) = self.cached, self.new
    if scales is not None and scale is not None:
      scales[self.first + new] = scale[0]

  def floats(self, columns: int) -> jax.Array:
    """The new token's vector, broadcast over queries: ``[H, queries]``."""
    numbers = of_all_queries(self.token, columns)
    return numbers if self.new[1] is None else numbers * self.new[1][0]


def side_memory(stored: Stored, ring: tuple[int, int, int], dtype: DTypeLike) -> tuple[Tree, ...]:
  """The shared memory of a `Side` with products in this dtype."""
  (stages, block, width), quantised = ring, isinstance(stored, Quantised)
  data = jnp.int8 if quantised else dtype
  token, here = mosaic.SMEM((width,), data), mosaic.Barrier(num_arrivals=1 + quantised, num_barriers=stages)
  plain = token, here, shared_memory(data, *ring)
  return (*plain, mosaic.SMEM((stages, block), jnp.float32), shared_memory(dtype, block, width)) if quantised else plain


def of_a_head(refs: tuple[Tree, Tree | None], row: jax.Array, head: jax.Array) -> tuple[Tree, Tree | None]:
  """One row's KV head of vectors ``[B, K, …]``, and of their scales or None."""
  data, scales = refs
  return data.at[row, head], None if scales is None else scales.at[row, head]


Fetch = Callable[[jax.Array | int], None]
"""Starts the copy of a block, given its index, into a ring buffer."""


def start_fetching(fetches: tuple[Fetch, ...], stages: int, blocks: jax.Array) -> None:
  """Starts the copies of the first blocks, as many as the ring buffer holds."""
  for index in range(stages):

    @pl.when(index < blocks)
    def _(index: int = index) -> None:
      for fetch in fetches:
        fetch(index)


def columns_of(ref: Tree) -> jax.Array:
  """Loads rows from shared memory into a warpgroup's registers, transposed."""
  layout = mosaic.Layout.WGMMA_TRANSPOSED
  return mosaic.load(ref.transpose((1, 0)), *_INDEX, layout=layout, optimized=False)


def store_columns(x: jax.Array, ref: Tree) -> None:
  """Stores weights ``[slots, queries]`` in shared memory, transposed, as an operand of a product."""
  narrow = x.astype(ref.dtype)
  ref.transpose((1, 0))[...] = mosaic.layout_cast(narrow, mosaic.Layout.WGMMA_TRANSPOSED)
  mosaic.commit_smem()


def product(a: Tree, b: Tree) -> jax.Array:
  """The product of two arrays in shared memory, in a warpgroup's registers."""

  def within(ref: Tree) -> jax.Array:
    mosaic.wgmma(ref, a, b)
    return ref[...]

  return pl.run_scoped(within, mosaic.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))


def filled(number: float, *shape: int) -> jax.Array:
  """A constant array ``[rows, queries]``."""
  return mosaic.layout_cast(jnp.full(shape, number, jnp.float32), mosaic.Layout.WGMMA)


def slots_of(*shape: int) -> jax.Array:
  """The slot index of each score of a block."""
  return mosaic.broadcasted_iota(jnp.int32, shape, 0, layout=mosaic.Layout.WGMMA)


def of_all_slots(of_queries: jax.Array, rows: int) -> jax.Array:
  """Broadcasts per-query numbers over ``rows`` rows."""
  return jax.lax.broadcast_in_dim(of_queries, (rows, *of_queries.shape), [1])


def of_all_queries(ref: Tree, columns: int) -> jax.Array:
  """Broadcasts a head's numbers in shared memory over queries."""
  of_numbers = mosaic.load(ref, *_INDEX, layout=mosaic.Layout.WGMMA.reduce(1), optimized=False).astype(jnp.float32)
  return jax.lax.broadcast_in_dim(of_numbers, (*ref.shape, columns), [0])


def shared_memory(dtype: DTypeLike, *shape: int) -> Tree:
  """Shared memory in the tiled and swizzled layout of tensor cores, swizzled by up to 128 bytes."""
  size = jnp.dtype(dtype).itemsize
  row = min(128, shape[-1] * size)
  return mosaic.SMEM(shape, dtype, transforms=(mosaic.TilingTransform((8, row // size)), mosaic.SwizzleTransform(row)))
