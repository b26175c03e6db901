"""The cache of a decoding batch: keys of anchor layers, values of every layer."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.plan import SharingPlan


@struct.dataclass
class LayerCache:
  """One layer's cache. Token ``i`` of a row is at slot ``i``.

  Attributes:
    values: ``[B, K, S, R]``, in the compute dtype or as `sa_jax.ops.Quantised`.
    keys: ``[B, K, S, H]`` with RoPE applied, of the same type; None for followers, which have no keys.
  """

  values: ops.Stored
  keys: ops.Stored | None = None

  @classmethod
  def of(cls, config: ModelConfig, values: jax.Array, keys: jax.Array | None = None) -> LayerCache:
    """The cache of T tokens from values ``[B, T, K, R]`` and keys ``[B, T, K, H]``, in the config's format."""
    store = lambda x: _stored(config, jnp.swapaxes(x, 1, 2))
    return cls(store(values), None if keys is None else store(keys))


def _stored(config: ModelConfig, x: jax.Array) -> ops.Stored:
  """Keys ``[B, K, S, H]`` or values ``[B, K, S, R]`` in the compute dtype, converted to the config's format."""
  return x if config.cache_format is None else config.cache_format.store(x)


@struct.dataclass
class Cache:
  """The cache of all layers.

  Attributes:
    layers: one `LayerCache` per layer, in order; if paged, the first axis is P and slots are those of a page.
    pages: the page table; None if row ``b`` is at index ``b`` of the arrays.
  """

  layers: tuple[LayerCache, ...]
  pages: ops.Pages | None = None

  @classmethod
  def empty(cls, config: ModelConfig, plan: SharingPlan, batch: int, capacity: int) -> Cache:
    """A zeroed cache with ``capacity`` slots per row."""

    def zeros(width: int) -> ops.Stored:
      vectors = jax.ShapeDtypeStruct((batch, config.num_kv_heads, capacity, width), config.dtype)
      stored = jax.eval_shape(partial(_stored, config), vectors)  # otherwise XLA rounds the zeros at compile time
      return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stored)

    keys = lambda layer: zeros(config.head_dim) if plan.is_anchor(layer) else None
    return cls(tuple(LayerCache(zeros(config.value_width), keys(layer)) for layer in range(plan.num_layers)))

  def grow(self, capacity: int) -> Cache:
    """The cache extended to ``capacity`` slots per row.

    Raises:
      UserError: if it already has more slots, or is paged.
    """
    if self.pages is not None:
      raise UserError("a paged cache cannot grow: make one with more pages")
    if capacity < self.capacity:
      raise UserError(
        f"a cache of {self.capacity} slots cannot shrink to {capacity}; grow it to at least {self.capacity}"
      )
    room = ((0, 0), (0, 0), (0, capacity - self.capacity), (0, 0))
    return jax.tree.map(lambda x: jnp.pad(x, room), self)

  @property
  def capacity(self) -> int:
    """Slots per row; if paged, the maximum for one row."""
    slots = jax.tree.leaves(self.layers[0].values)[0].shape[2]
    return slots if self.pages is None else slots * self.pages.table.shape[1]

  @property
  def nbytes(self) -> int:
    """Total bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
