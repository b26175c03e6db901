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

  new = pl.BlockSpec((None, None, head_dim), lambda b, k, s: (b, k, 0))
  cached = pl.BlockSpec((None, None, split, head_dim), lambda b, k, s: (b, k, s, 0))
  partial = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda b, k, s: (b, k, s, *(0 for _ in shape)))
  out, log_total, keys, values = pl.pallas_call(
    functools.partial(_kernel, group=group, scale=scale),
    grid=(batch, kv_heads, splits),
    in_specs=[
      pl.BlockSpec((None,), lambda b, k, s: (b,)),
      pl.BlockSpec((None, None, rows, head_dim), lambda b, k, s: (b, k, 0, 0)),
      new,
      new,
      cached,
      cached,
    ],
    out_specs=[partial(rows, head_dim), partial(rows), cached, cached],
    out_shape=[
      jax.ShapeDtypeStruct((batch, kv_heads, splits, group, head_dim), values.dtype if splits == 1 else jnp.float32),
      jax.ShapeDtypeStruct((batch, kv_heads, splits, group), jnp.float32),
      jax.ShapeDtypeStruct(keys.shape, keys.dtype),
      jax.ShapeDtypeStruct(values.shape, values.dtype),
    ],
    input_output_aliases={4: 2, 5: 3},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="flash_decode",
  )(
    positions,
    q.reshape(batch, kv_heads, group, head_dim),
    new_key.astype(keys.dtype),
    new_value.astype(values.dtype),
    keys,
    values,
  )
  if splits > 1:
    out = jnp.einsum("BKSGH,BKSG->BKGH", out, jax.nn.softmax(log_total, axis=2))
  return out.astype(values.dtype).reshape(batch, heads, head_dim), keys, values


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
  split = key_ref.shape[0]
  new = position_ref[...] - pl.program_id(2) * split  # the new token's slot, counted from this program's first
  kept = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < group
  kept_2d = jax.lax.broadcasted_iota(jnp.int32, (rows, head_dim), 0) < group
  q = plgpu.load(q_ref, mask=kept_2d, other=0.0)

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
  new_key, new_value = new_key_ref[...], new_value_ref[...]
  mine = (new >= 0) & (new < split)
  score = (q.astype(jnp.float32) * new_key.astype(jnp.float32)[None, :]).sum(axis=1) * scale
  score = jnp.where(mine, score, MASKED)
  new_maximum = jnp.maximum(maximum, score)
  weight, shrink = jnp.where(mine, jnp.exp(score - new_maximum), 0.0), jnp.exp(maximum - new_maximum)
  accumulated = accumulated * shrink[:, None] + weight[:, None] * new_value.astype(jnp.float32)[None, :]
  maximum, total = new_maximum, total * shrink + weight
  # A split past the row's end has no slot to weigh: its share in the whole is nothing, of numbers that are finite.
  mean = accumulated / jnp.where(total > 0, total, 1.0)[:, None]
  plgpu.store(out_ref, mean.astype(out_ref.dtype), mask=kept_2d)
  plgpu.store(log_total_ref, maximum + jnp.log(total), mask=kept)

  slot = jnp.clip(new, 0, split - 1)
  plgpu.store(key_out_ref.at[slot, :], new_key, mask=jnp.broadcast_to(mine, (head_dim,)))
  plgpu.store(value_out_ref.at[slot, :], new_value, mask=jnp.broadcast_to(mine, (head_dim,)))
