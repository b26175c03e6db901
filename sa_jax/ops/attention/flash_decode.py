"""Decode attention as one kernel for NVIDIA GPUs (Pallas, Triton).

A row's slots are split over programs, each of which keeps a running maximum, sum and accumulator over its slots and
reads no slot past the row's end; a small reduction joins the splits (Dao et al., "Flash-Decoding", 2023). The program
that owns the new token's slot also writes its key and value, in place. It rotates
queries and the new key on the way in.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sa_jax.ops.attention.reference import MASKED
from sa_jax.ops.rope import Rotation

# Tensor cores multiply at least 16 rows.
_MIN_ROWS = 16
BLOCK = 64
"""Slots read at once; a cache's slots must be a multiple of it."""


def attend(
  q: jax.Array,
  new_key: jax.Array,
  new_value: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  positions: jax.Array,
  rotation: Rotation,
  *,
  scale: float,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Attention of one new token a row over the cache that it joins; arguments as in `sa_jax.ops.decode_attend`.

  ``scale`` multiplies ``q kᵀ``; ``interpret`` runs the kernel on any device, slowly.
  """
  batch, heads, head_dim = q.shape
  kv_heads, slots = keys.shape[1], keys.shape[2]
  group = heads // kv_heads
  rows = max(_MIN_ROWS, pl.next_power_of_2(group))
  split = choose_split(batch * kv_heads, slots)
  splits = slots // split

  # Each half of a head adds its partner's half, times a sine: signed, so that both halves do the same.
  (cos, sin) = (each[:, 0] for each in rotation)
  turns = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
  turn = pl.BlockSpec((None, head_dim), lambda b, k, s: (b, 0))
  new = pl.BlockSpec((None, None, head_dim), lambda b, k, s: (b, k, 0))
  cached = pl.BlockSpec((None, None, split, head_dim), lambda b, k, s: (b, k, s, 0))
  partial = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda b, k, s: (b, k, s, *(0 for _ in shape)))
  out, maximum, total, keys, values = pl.pallas_call(
    functools.partial(_kernel, group=group, alone=splits == 1, scale=scale),
    grid=(batch, kv_heads, splits),
    in_specs=[
      pl.BlockSpec((None,), lambda b, k, s: (b,)),
      pl.BlockSpec((None, None, rows, head_dim), lambda b, k, s: (b, k, 0, 0)),
      new,
      new,
      turn,
      turn,
      cached,
      cached,
    ],
    out_specs=[partial(rows, head_dim), partial(rows), partial(rows), cached, cached],
    out_shape=[
      jax.ShapeDtypeStruct((batch, kv_heads, splits, group, head_dim), values.dtype if splits == 1 else jnp.float32),
      jax.ShapeDtypeStruct((batch, kv_heads, splits, group), jnp.float32),
      jax.ShapeDtypeStruct((batch, kv_heads, splits, group), jnp.float32),
      jax.ShapeDtypeStruct(keys.shape, keys.dtype),
      jax.ShapeDtypeStruct(values.shape, values.dtype),
    ],
    input_output_aliases={6: 3, 7: 4},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="flash_decode",
  )(
    positions,
    q.reshape(batch, kv_heads, group, head_dim),
    new_key.astype(keys.dtype),
    new_value.astype(values.dtype),
    *turns,
    keys,
    values,
  )
  if splits == 1:
    return out.reshape(batch, heads, head_dim), keys, values
  weight = jnp.exp(maximum - maximum.max(axis=2, keepdims=True))
  joined = (weight[..., None] * out).sum(axis=2) / (weight * total).sum(axis=2)[..., None]
  return joined.astype(values.dtype).reshape(batch, heads, head_dim), keys, values


def choose_split(rows: int, slots: int, processors: int = 132) -> int:
  """Slots a program: as many as divide ``slots``, up to 2048, while every multiprocessor has work."""
  split = BLOCK
  while slots % (2 * split) == 0 and split < 2048 and rows * (slots // (2 * split)) >= processors * 3 // 4:
    split *= 2
  return split


def _kernel(
  position_ref: Any,
  q_ref: Any,
  new_key_ref: Any,
  new_value_ref: Any,
  cos_ref: Any,
  sin_ref: Any,
  key_ref: Any,
  value_ref: Any,
  out_ref: Any,
  maximum_ref: Any,
  total_ref: Any,
  key_out_ref: Any,
  value_out_ref: Any,
  *,
  group: int,
  alone: bool,
  scale: float,
) -> None:
  rows, head_dim = q_ref.shape
  split = key_ref.shape[0]
  new = position_ref[...] - pl.program_id(2) * split  # the new token's slot, counted from this program's first
  kept = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < group
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (rows, head_dim), axis) for axis in (0, 1))
  kept_2d = row < group
  half = head_dim // 2
  partner_of = lambda column: jnp.where(column < half, column + half, column - half)
  cos, sin = cos_ref[...], sin_ref[...]

  def turned(x: jax.Array, partner: jax.Array, over: Any) -> jax.Array:
    return (x.astype(jnp.float32) * cos[over] + partner.astype(jnp.float32) * sin[over]).astype(x.dtype)

  q_partners = plgpu.load(q_ref.at[row, partner_of(column)], mask=kept_2d, other=0.0)
  q = turned(plgpu.load(q_ref, mask=kept_2d, other=0.0), q_partners, (jnp.newaxis, slice(None)))

  def block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    accumulated, maximum, total = carry
    here = pl.ds(index * BLOCK, BLOCK)
    scores = plgpu.dot(q, key_ref[here, :].T) * scale
    slots = index * BLOCK + jax.lax.broadcasted_iota(jnp.int32, (rows, BLOCK), 1)
    scores = jnp.where(slots < new, scores, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    weights = jnp.exp(scores - new_maximum[:, None])
    shrink = jnp.exp(maximum - new_maximum)
    v = value_ref[here, :]
    accumulated = accumulated * shrink[:, None] + plgpu.dot(weights.astype(v.dtype), v)
    return accumulated, new_maximum, total * shrink + weights.sum(axis=1)

  start = (
    jnp.zeros((rows, head_dim), jnp.float32),
    jnp.full((rows,), MASKED, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
  )
  blocks = jnp.clip(pl.cdiv(new, BLOCK), 0, split // BLOCK)
  accumulated, maximum, total = jax.lax.fori_loop(0, blocks, block, start)

  # The new token joins from registers: the loop above stays a plain stream of the cache, which pipelines.
  key_partners = new_key_ref[partner_of(jax.lax.broadcasted_iota(jnp.int32, (head_dim,), 0))]
  new_key, new_value = turned(new_key_ref[...], key_partners, slice(None)), new_value_ref[...]
  mine = (new >= 0) & (new < split)
  score = (q.astype(jnp.float32) * new_key.astype(jnp.float32)[None, :]).sum(axis=1) * scale
  score = jnp.where(mine, score, MASKED)
  new_maximum = jnp.maximum(maximum, score)
  weight, shrink = jnp.where(mine, jnp.exp(score - new_maximum), 0.0), jnp.exp(maximum - new_maximum)
  accumulated = accumulated * shrink[:, None] + weight[:, None] * new_value.astype(jnp.float32)[None, :]
  maximum, total = new_maximum, total * shrink + weight
  if alone:  # nothing to join, and no kernel more
    accumulated = accumulated / total[:, None]
  plgpu.store(out_ref, accumulated.astype(out_ref.dtype), mask=kept_2d)
  plgpu.store(maximum_ref, maximum, mask=kept)
  plgpu.store(total_ref, total, mask=kept)

  slot = jnp.clip(new, 0, split - 1)
  plgpu.store(key_out_ref.at[slot, :], new_key, mask=jnp.broadcast_to(mine, (head_dim,)))
  plgpu.store(value_out_ref.at[slot, :], new_value, mask=jnp.broadcast_to(mine, (head_dim,)))
