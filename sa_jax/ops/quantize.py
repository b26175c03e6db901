"""Int8 vectors with a scale each: half the bytes of bfloat16."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """Vectors along the last axis: ``data * scale``.

  Attributes:
    data: int8 ``[..., H]``.
    scale: float32 ``[..., 1]``, a 127th of the largest magnitude of each vector.
  """

  data: jax.Array
  scale: jax.Array

  @classmethod
  def of(cls, x: jax.Array) -> Int8:
    """The nearest int8 vectors to float ``[..., H]``: no element is off by more than half its vector's scale."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127.0
    return cls(jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale)


Stored = jax.Array | Int8
"""Vectors as a cache may hold them, keys or values ``[B, K, S, H]`` for example."""


def product_dtype(stored: Stored | jax.Ref, dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
  """What weights are multiplied by cached vectors in, scales being multiplied into the weights.

  Float16 has no room for the product of a small weight and a small scale; bfloat16 holds every int8.
  """
  return jnp.bfloat16 if isinstance(stored, Int8) and dtype == jnp.float16 else dtype


def as_stored(new: jax.Array, cache: Stored) -> Stored:
  """New vectors in the form of those of a cache that they join."""
  return Int8.of(new) if isinstance(cache, Int8) else new.astype(cache.dtype)
