"""Decode attention as one kernel for NVIDIA GPUs (Pallas, Triton).

A row's slots are split over programs, each of which keeps a running maximum, sum and accumulator over its slots and
reads no slot past the row's end; a small reduction joins the splits, if there are several (Dao et al.,
"Flash-Decoding", 2023). The program
that owns the new token's slot also writes its key and value, in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sa_jax.ops.attention.reference import MASKED
from sa_jax.ops.quantize import Int8, Stored, as_stored

# Tensor cores multiply at least 16 rows.
_MIN_ROWS = 16
BLOCK = 64
"""Slots read at once; a cache's slots must be a multiple of it."""
_PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""


def attend(
  q: jax.Array,
  new_key: jax.Array,
  new_value: jax.Array,
  keys: Stored,
  values: Stored,
  positions: jax.Array,
  *,
  scale: float,
  interpret: bool = False,
) -> tuple[jax.Array, Stored, Stored]:
  """Attention of one new token a row over the cache that it joins; arguments as in `sa_jax.ops.decode_attend`.

  ``scale`` multiplies ``q kᵀ``; ``interpret`` runs the kernel on any device, slowly.
  """
  batch, heads, head_dim = q.shape
  kv_heads, slots = jax.tree.leaves(keys)[0].shape[1:3]
  group = heads // kv_heads
  rows = max(_MIN_ROWS, pl.next_power_of_2(group))
  split = choose_split(batch * kv_heads, slots)
  splits = slots // split

  # Of an int8 cache, one spec for the vectors and one for their scales.
  each = lambda stored, spec: jax.tree.map(lambda x: spec(x.shape[-1]), stored)
  new = lambda size: pl.BlockSpec((None, None, size), lambda b, k, s: (b, k, 0))
  cached = lambda size: pl.BlockSpec((None, None, split, size), lambda b, k, s: (b, k, s, 0))
  partial = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda b, k, s: (b, k, s, *(0 for _ in shape)))

  token = as_stored(new_key, keys), as_stored(new_value, values)
  cache = keys, values
  before = 2 + len(jax.tree.leaves(token))  # arrays before the cache's: positions, queries, the token's
  # How many blocks are on their way from memory: three, unless shared memory then has no room for all programs at once
  # (32 KB a block of keys and values, 128 wide in bfloat16; int8 takes half).
  stages = 3 if isinstance(keys, Int8) or batch * kv_heads * splits <= 2 * _PROCESSORS else 2
  out, log_total, *cache = pl.pallas_call(
    functools.partial(_kernel, group=group, scale=scale),
    grid=(batch, kv_heads, splits),
    in_specs=[
      pl.BlockSpec((None,), lambda b, k, s: (b,)),
      pl.BlockSpec((None, None, rows, head_dim), lambda b, k, s: (b, k, 0, 0)),
      *each(token, new),
      *each(cache, cached),
    ],
    out_specs=[partial(rows, head_dim), partial(rows), *each(cache, cached)],
    out_shape=[
      jax.ShapeDtypeStruct((batch, kv_heads, splits, group, head_dim), q.dtype if splits == 1 else jnp.float32),
      jax.ShapeDtypeStruct((batch, kv_heads, splits, group), jnp.float32),
      *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache),
    ],
    input_output_aliases={before + leaf: 2 + leaf for leaf in range(len(jax.tree.leaves(cache)))},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=stages),
    interpret=interpret,
    name="flash_decode",
  )(positions, q.reshape(batch, kv_heads, group, head_dim), *token, *cache)
  if splits > 1:
    out = jnp.einsum("BKSGH,BKSG->BKGH", out, jax.nn.softmax(log_total, axis=2))
  return out.astype(q.dtype).reshape(batch, heads, head_dim), *cache


def choose_split(rows: int, slots: int) -> int:
  """Slots a program: as many as divide ``slots``, up to 2048, while every multiprocessor has work."""
  split = BLOCK
  while slots % (2 * split) == 0 and split < 2048 and rows * (slots // (2 * split)) >= _PROCESSORS * 3 // 4:
    split *= 2
  return split


def _kernel(
  position_ref: Any,
  q_ref: Any,
  new_key_ref: Any,
  new_value_ref: Any,
  key_ref: Any,
  value_ref: Any,
  out_ref: Any,
  log_total_ref: Any,
  key_out_ref: Any,
  value_out_ref: Any,
  *,
  group: int,
  scale: float,
) -> None:
  rows, head_dim = q_ref.shape
  split = jax.tree.leaves(key_ref)[0].shape[0]
  new = position_ref[...] - pl.program_id(2) * split  # the new token's slot, counted from this program's first
  kept = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < group
  kept_2d = jax.lax.broadcasted_iota(jnp.int32, (rows, head_dim), 0) < group
  q = plgpu.load(q_ref, mask=kept_2d, other=0.0)

  def block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    accumulated, maximum, total = carry
    here = pl.ds(index * BLOCK, BLOCK)
    k, key_scale = _block(key_ref, here, q.dtype)
    scores = plgpu.dot(q, k.T) * (scale * key_scale)
    slots = index * BLOCK + jax.lax.broadcasted_iota(jnp.int32, (rows, BLOCK), 1)
    scores = jnp.where(slots < new, scores, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    weights = jnp.exp(scores - new_maximum[:, None])
    shrink = jnp.exp(maximum - new_maximum)
    v, value_scale = _block(value_ref, here, q.dtype)
    accumulated = accumulated * shrink[:, None] + plgpu.dot((weights * value_scale).astype(v.dtype), v)
    return accumulated, new_maximum, total * shrink + weights.sum(axis=1)

  start = (
    jnp.zeros((rows, head_dim), jnp.float32),
    jnp.full((rows,), MASKED, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
  )
  blocks = jnp.clip(pl.cdiv(new, BLOCK), 0, split // BLOCK)
  accumulated, maximum, total = jax.lax.fori_loop(0, blocks, block, start)

  # The new token joins from registers: the loop above stays a plain stream of the cache, which pipelines.
  mine = (new >= 0) & (new < split)
  score = (q.astype(jnp.float32) * _float(new_key_ref)[None, :]).sum(axis=1) * scale
  score = jnp.where(mine, score, MASKED)
  new_maximum = jnp.maximum(maximum, score)
  weight, shrink = jnp.where(mine, jnp.exp(score - new_maximum), 0.0), jnp.exp(maximum - new_maximum)
  accumulated = accumulated * shrink[:, None] + weight[:, None] * _float(new_value_ref)[None, :]
  maximum, total = new_maximum, total * shrink + weight
  # A split past the row's end has no slot to weigh: its share in the whole is nothing, of numbers that are finite.
  mean = accumulated / jnp.where(total > 0, total, 1.0)[:, None]
  plgpu.store(out_ref, mean.astype(out_ref.dtype), mask=kept_2d)
  plgpu.store(log_total_ref, maximum + jnp.log(total), mask=kept)

  slot = jnp.clip(new, 0, split - 1)
  for cache, each in ((key_out_ref, new_key_ref), (value_out_ref, new_value_ref)):
    for into, ref in zip(jax.tree.leaves(cache), jax.tree.leaves(each), strict=True):
      plgpu.store(into.at[slot, :], ref[...], mask=jnp.broadcast_to(mine, ref.shape))


def _block(ref: Any, here: Any, dtype: Any) -> tuple[jax.Array, jax.Array | float]:
  """A block of cached vectors, and what is to be multiplied into their products instead of into each of them."""
  if isinstance(ref, Int8):
    return ref.data[here, :].astype(dtype), ref.scale[here, 0][None, :]
  return ref[here, :], 1.0


def _float(ref: Any) -> jax.Array:
  """A new token's vector, as its cache has it."""
  if isinstance(ref, Int8):
    return ref.data[...].astype(jnp.float32) * ref.scale[...]
  return ref[...].astype(jnp.float32)
