"""The cache of a decoding batch: keys of anchor layers, values of every layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from sa_jax.config import ModelConfig
from sa_jax.plan import SharingPlan


@struct.dataclass
class LayerCache:
  """One layer's cache. Token ``i`` of a row sits at slot ``i``.

  Attributes:
    values: ``[B, K, S, H]``.
    keys: ``[B, K, S, H]`` rotary-encoded, or None in a follower, which never sees a key.
  """

  values: jax.Array
  keys: jax.Array | None = None


@struct.dataclass
class Cache:
  """The cache of all layers.

  Attributes:
    layers: one `LayerCache` a layer, in order.
  """

  layers: tuple[LayerCache, ...]

  @classmethod
  def empty(cls, config: ModelConfig, plan: SharingPlan, batch: int, capacity: int) -> Cache:
    """A zeroed cache of ``capacity`` slots a row, in the config's compute dtype."""
    shape = (batch, config.num_kv_heads, capacity, config.head_dim)
    zeros = lambda: jnp.zeros(shape, config.dtype)
    return cls(
      tuple(LayerCache(zeros(), zeros() if plan.is_anchor(layer) else None) for layer in range(plan.num_layers))
    )

  @property
  def capacity(self) -> int:
    """Slots a row."""
    return self.layers[0].values.shape[2]

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))
