"""How kernels read cached vectors: in parts, and unscaled. Scales are applied to their products instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sa_jax.ops.kernels import triton as plgpu
from sa_jax.ops.quantize import Quantised, Stored

Scales = jax.Array | None
"""Float32 scales of a block of quantised vectors; None for vectors that are not quantised."""


def parts_of(ref: jax.Ref, stored: Stored | jax.Ref) -> list[jax.Ref]:
  """Splits ``[rows, n]`` into as many parts as a block of cached vectors has."""
  parts = stored.format.per_byte if isinstance(stored, Quantised) else 1
  size = ref.shape[1] // parts
  return [ref.at[:, pl.ds(part * size, size)] for part in range(parts)]


def block_of(ref: Stored | jax.Ref, here: Any, dtype: jax.typing.DTypeLike, interpret: bool) -> list[jax.Array]:
  """Reads a block of cached vectors, in parts, without scales."""
  if not isinstance(ref, Quantised):
    return [ref[here, :]]
  if ref.format.bits == 4 and dtype == jnp.bfloat16 and not interpret:
    return [_nibbles(ref.data[here, :], into) for into in ("mov.b32 here, $2;", "shr.u32 here, $2, 4;")]
  return [part.astype(dtype) for part in ref.format.parts(ref.data[here, :])]


def _nibbles(data: jax.Array, into: str) -> jax.Array:
  """Converts the low nibbles of bytes to bfloat16, four at a time: half of `Format.parts` in fewer instructions.

  The bfloat16 numbers from 2048 to 2288 in steps of 16 differ only in four mantissa bits. The nibble, with its sign bit
  flipped, is placed there, and 2176 is subtracted.

  Args:
    data: int8, any shape.
    into: a PTX instruction that moves the bytes from register ``$2`` to ``here``, with the nibbles in the low halves.
  """
  like = jax.ShapeDtypeStruct(data.shape, jnp.bfloat16)
  text = f"""{{
    .reg .b32 here, one, less, low, high;
    {into}
    mov.b32 one, 0x3F803F80;
    mov.b32 less, 0xC508C508;
    prmt.b32 low, here, 0x45454545, 0x4140;
    prmt.b32 high, here, 0x45454545, 0x4342;
    lop3.b32 low, low, 0x00080008, 0xFF0FFF0F, 0x28;
    lop3.b32 high, high, 0x00080008, 0xFF0FFF0F, 0x28;
    fma.rn.bf16x2 $0, low, one, less;
    fma.rn.bf16x2 $1, high, one, less;
  }}"""
  [made] = plgpu.elementwise_inline_asm(text, args=[data], constraints="=r,=r,r", pack=4, result_shape_dtypes=[like])
  return made


def scales_of(ref: Stored | jax.Ref, index: jax.Array | int, size: int) -> Scales:
  """The scales of a block, to be applied to its products; None for vectors that are not quantised.

  Callers load them one block ahead, to hide the latency.
  """
  if isinstance(ref, Quantised):
    return ref.scale[pl.ds(index * size, size), 0].astype(jnp.float32)
  return None


def times_scales(products: jax.Array, scales: Scales) -> jax.Array:
  """Scales ``[rows, slots]``: products with a block's vectors, or weights of them."""
  return products if scales is None else products * scales[None, :]


def floats_of(ref: Stored | jax.Ref) -> Sequence[jax.Array]:
  """A new token's vector as stored in its cache, in parts, float32."""
  if isinstance(ref, Quantised):
    scale = ref.scale[...].astype(jnp.float32)
    return [part.astype(jnp.float32) * scale for part in ref.format.parts(ref.data[...])]
  return [ref[...].astype(jnp.float32)]
