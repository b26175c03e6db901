"""Cached vectors in whole numbers with a scale each: int8 takes half of bfloat16's bytes, int4 a good quarter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Format:
  """How a cache stores vectors: one scale each, and whole numbers of 8 bits, or of 4 bits two in a byte.

  Numbers of 4 bits are multiples of 16 from -128 to 112, as if alone in the high half of a byte: so a kernel gets them
  with one operation from a byte that holds two.

  Attributes:
    bits: of a number, 8 or 4.
    scale_dtype: of the scales.
    rotates_keys: whether queries and keys are to go through `hadamard`. One scale is enough for a vector whose numbers
      are of like size, and keys have a few channels that are much larger than the others.
  """

  bits: int
  scale_dtype: str
  rotates_keys: bool = False

  @property
  def step(self) -> int:
    """From one number to the next."""
    return 1 << (8 - self.bits)

  @property
  def a_byte(self) -> int:
    """Numbers in a byte."""
    return 8 // self.bits

  def nbytes(self, width: int) -> int:
    """Bytes of one vector of so many numbers."""
    return width // self.a_byte + jnp.dtype(self.scale_dtype).itemsize

  def store(self, x: jax.Array) -> Quantised:
    """The nearest vectors to float ``[..., H]`` whose element of the largest magnitude is the number -128.

    No element is off by more than half a step of its vector's scale; but by up to a whole one where it is nearly as
    large as the largest, and of the other sign.
    """
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
    scale = (jnp.where(high > -low, high, low) / -128).astype(self.scale_dtype)
    steps = jnp.round(x / (self.step * jnp.where(scale == 0, 1, scale).astype(jnp.float32)))
    numbers = jnp.clip(self.step * steps, -128, 128 - self.step).astype(jnp.int8)
    if self.bits == 8:
      return Quantised(numbers, scale, self)
    low, high = jnp.split(numbers, 2, axis=-1)
    return Quantised(high | (low >> 4 & 15), scale, self)

  def parts(self, data: jax.Array) -> tuple[jax.Array, ...]:
    """The numbers that stored bytes hold, int8: all of a vector's, or its first half and its second."""
    return (data,) if self.bits == 8 else (data << 4, data & -16)


FORMATS: Mapping[str, Format] = {
  "int8": Format(8, "float32"),
  "int4": Format(4, "bfloat16", rotates_keys=True),
}
"""By the name that a config's ``cache_dtype`` gives them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
  """Vectors along the last axis: whole numbers times ``scale``.

  Attributes:
    data: int8 ``[..., H]``; of 4 bits int8 ``[..., H / 2]``, the first half of a vector in the low halves of bytes, the
      second in the high ones.
    scale: ``[..., 1]``.
    format: what they are stored in.
  """

  data: jax.Array
  scale: jax.Array
  format: Format = dataclasses.field(metadata={"static": True})

  @property
  def width(self) -> int:
    """``H``."""
    return self.data.shape[-1] * self.format.a_byte

  def numbers(self) -> jax.Array:
    """The whole numbers, int8 ``[..., H]``."""
    return jnp.concatenate(self.format.parts(self.data), axis=-1)

  def vectors(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The vectors that are meant, ``[..., H]``."""
    return (self.numbers().astype(jnp.float32) * self.scale.astype(jnp.float32)).astype(dtype)


Stored = jax.Array | Quantised
"""Vectors as a cache may hold them, keys or values ``[B, K, S, H]`` for example."""


def product_dtype(stored: Stored | jax.Ref, dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
  """What weights are multiplied by cached vectors in, scales being multiplied into the weights.

  Float16 has no room for the product of a small weight and a small scale; bfloat16 holds every int8.
  """
  return jnp.bfloat16 if isinstance(stored, Quantised) and dtype == jnp.float16 else dtype


def as_stored(new: jax.Array, cache: Stored) -> Stored:
  """New vectors in the form of those of a cache that they join."""
  return cache.format.store(new) if isinstance(cache, Quantised) else new.astype(cache.dtype)


def hadamard(x: jax.Array) -> jax.Array:
  """Vectors ``[..., H]`` rotated so that a large element's size is spread over all; products of two stay what they are.

  A Hadamard matrix over its root, as QuaRot rotates queries and keys after their position embedding (Ashkboos et al.,
  arXiv 2404.00456, section 4). Of an ``H`` that is no power of two, parts as large as the powers that divide it.
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
