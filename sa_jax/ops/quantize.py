"""Quantised cache vectors, one scale each: int8 takes half of bfloat16's bytes, int4 slightly over a quarter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
  """How a cache stores vectors: one scale each, and integers of 8 bits, or of 4 bits with two per byte.

  4-bit numbers are multiples of 16 from -128 to 112, as if in the high half of a byte: a kernel extracts each from a
  packed byte with one operation.

  Attributes:
    bits: bits per number, 8 or 4.
    scale_dtype: dtype of the scales.
    rotates_keys: whether queries and keys go through `hadamard`. One scale per vector suffices if its elements have
      similar magnitudes, but keys have a few channels that are much larger than the others.
  """

  bits: int
  scale_dtype: str
  rotates_keys: bool = False

  @property
  def step(self) -> int:
    """Distance between adjacent numbers."""
    return 1 << (8 - self.bits)

  @property
  def per_byte(self) -> int:
    """Numbers per byte."""
    return 8 // self.bits

  def nbytes(self, width: int) -> int:
    """Bytes of one vector of ``width`` numbers."""
    return width // self.per_byte + jnp.dtype(self.scale_dtype).itemsize

  def store(self, x: jax.Array) -> Quantised:
    """Quantises float ``[..., H]``, mapping the element of the largest magnitude to -128.

    The error is at most half a step of the vector's scale, except for elements of the opposite sign that are nearly as
    large as the largest: there it is at most one step.
    """
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    scale = (jnp.where(high > -low, high, low) / -128).astype(self.scale_dtype)
    steps = jnp.round(x / (self.step * jnp.where(scale == 0, 1, scale).astype(jnp.float32)))
    numbers = jnp.clip(self.step * steps, -128, 128 - self.step).astype(jnp.int8)
    if self.bits == 8:
      return Quantised(numbers, scale, self)
    first, second = jnp.split(numbers, 2, axis=-1)
    return Quantised(second | (first >> 4 & 15), scale, self)

  def parts(self, data: jax.Array) -> tuple[jax.Array, ...]:
    """Unpacks stored bytes to int8 numbers: a whole vector, or its first and second halves."""
    return (data,) if self.bits == 8 else (data << 4, data & -16)


FORMATS: Mapping[str, Format] = {
  "int8": Format(8, "float32"),
  "int4": Format(4, "bfloat16", rotates_keys=True),
}
"""Formats by the config's ``cache_dtype``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
  """Quantised vectors along the last axis: integers times ``scale``.

  Attributes:
    data: int8 ``[..., H]``; for 4 bits int8 ``[..., H / 2]``, the first half of a vector in the low halves of bytes,
      the second in the high halves.
    scale: ``[..., 1]``.
    format: the storage format.
  """

  data: jax.Array
  scale: jax.Array
  format: Format = dataclasses.field(metadata={"static": True})

  @property
  def width(self) -> int:
    """``H``."""
    return self.data.shape[-1] * self.format.per_byte

  def numbers(self) -> jax.Array:
    """The integers, int8 ``[..., H]``."""
    return jnp.concatenate(self.format.parts(self.data), axis=-1)

  def vectors(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The dequantised vectors, ``[..., H]``."""
    return (self.numbers().astype(jnp.float32) * self.scale.astype(jnp.float32)).astype(dtype)


Stored = jax.Array | Quantised
"""Vectors as a cache stores them, e.g. keys or values ``[B, K, S, H]``."""


def product_dtype(stored: Stored | jax.Ref, dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
  """The dtype of products of weights and cached vectors, with the scales multiplied into the weights.

  The product of a small weight and a small scale underflows in float16; bfloat16 represents every int8 exactly.
  """
  return jnp.bfloat16 if isinstance(stored, Quantised) and dtype == jnp.float16 else dtype


def as_stored(new: jax.Array, cache: Stored) -> Stored:
  """New vectors converted to the cache's format."""
  return cache.format.store(new) if isinstance(cache, Quantised) else new.astype(cache.dtype)


def hadamard(x: jax.Array) -> jax.Array:
  """Rotates vectors ``[..., H]`` so that large elements are spread over all; inner products are unchanged.

  A normalised Hadamard matrix, as QuaRot applies to queries and keys after RoPE (Ashkboos et al., arXiv 2404.00456,
  section 4). If ``H`` is not a power of two, it applies to blocks of the largest power of two that divides it.
  """
  width = x.shape[-1]
  size = width & -width
  signs = np.ones((1, 1))
  while len(signs) < size:
    signs = np.block([[signs, signs], [signs, -signs]])
  parts = x.reshape(*x.shape[:-1], width // size, size)
  exact = jax.lax.Precision.HIGHEST
  rotated = jnp.matmul(parts, jnp.asarray(signs, x.dtype), precision=exact, preferred_element_type=jnp.float32)
  return (rotated * size**-0.5).astype(x.dtype).reshape(x.shape)
