"""Decode attention in Pallas Triton: one kernel per layer, for anchors and for followers.

A row's slots are split over programs. No program reads past the block in which the row ends; the contents of that block
must be finite. An anchor's program keeps a running maximum, sum and accumulator; if a row has several splits, a small
reduction combines them (Dao et al., "Flash-Decoding", 2023). The program that owns the new token's slot also writes its
key and value, in place.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sa_jax.ops.attention.joined import Partial, joined
from sa_jax.ops.attention.pages import Pages
from sa_jax.ops.attention.reference import MASKED
from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.attention.stored import Scales, block_of, floats_of, parts_of, scales_of, times_scales
from sa_jax.ops.kernels import triton as plgpu
from sa_jax.ops.quantize import Quantised, Stored, as_stored, product_dtype
from sa_jax.trees import Tree

# Tensor cores multiply at least 16 rows.
_MIN_ROWS = 16
BLOCK = 64
"""The number of slots of a cache, and of a block, must be a multiple of this."""
_PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200."""


class Tiling(NamedTuple):
  """Tuning parameters of a decode kernel.

  Attributes:
    block: slots per block.
    warps: warps per program.
    stages: pipeline depth, in blocks.
    longest: maximum number of slots per program.
  """

  block: int = BLOCK
  warps: int = 4
  stages: int = 3
  longest: int = 2048


TILINGS = {
  (16, False): Tiling(stages=2),
  (16, True): Tiling(128, stages=2),
  (8, False): Tiling(128),
  (8, True): Tiling(128),
  (4, False): Tiling(warps=1),
  (4, True): Tiling(128, warps=2),
}
"""Tilings of anchors by the bits of a cached number and whether values are narrower than keys. Tuned for 16 rows of
16,384 tokens on an H200 (`experiments/efficiency`), except narrow values in int8, which were not timed."""


class How(NamedTuple):
  """Static options.

  Attributes:
    scale: factor of ``q kᵀ``.
    with_weights: whether to return the softmaxed weights, for followers.
  """

  scale: float
  with_weights: bool = False


def attend(
  q: jax.Array,
  new: tuple[jax.Array, jax.Array],
  cached: tuple[Stored, Stored],
  rows: Rows,
  how: How,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None, tuple[Stored, Stored]]:
  """Adds one new token per row to the cache and computes its attention over it.

  Args:
    q: ``[B, N, H]``.
    new: the token's key ``[B, K, H]`` and value ``[B, K, R]``.
    cached: keys ``[B, K, S, H]`` and values ``[B, K, S, R]``; with pages, P instead of B.
    rows: ``rows.offset``, int32 ``[B]``, is the slot for each row's token; ``rows.sinks`` and ``rows.pages``.
    how: static options.
    interpret: run the kernel in Pallas's interpreter, on any device.

  Returns:
    The output ``[B, N, R]``; the weights ``[B, N, S]`` in q's dtype (with pages ``[P, N, S]``) or None; the updated
    keys and values.
  """
  assert rows.offset is not None, "a new token has a slot in the cache"
  (keys, values), (new_key, new_value), positions, pages = cached, new, rows.offset, rows.pages
  if pages is not None:
    q, new_key, new_value = (pages.of_rows(x) for x in (q, new_key, new_value))
    positions = pages.offsets(positions)
  batch, heads, head_dim = q.shape
  kv_heads, slots = jax.tree.leaves(keys)[0].shape[1:3]
  width = new_value.shape[2]
  group = heads // kv_heads
  tiles = TILINGS[keys.format.bits if isinstance(keys, Quantised) else 16, width < head_dim]
  block = math.gcd(slots, tiles.block)
  # Enough programs to occupy the multiprocessors.
  split = choose_split(batch * kv_heads, slots, programs=_PROCESSORS * 3 // 4, longest=tiles.longest)
  block, splits = min(block, split), slots // split

  token = as_stored(new_key, keys), as_stored(new_value, values)
  before = 2 + len(jax.tree.leaves(token))  # inputs before the cache: positions, queries, the token's
  # Shared memory allows a deeper pipeline if there are few programs: 64 slots of bfloat16 keys and values of width 128
  # take 32 KB.
  stages = max(3, tiles.stages) if batch * kv_heads * splits <= 2 * _PROCESSORS else tiles.stages
  [made] = pl.pallas_call(
    functools.partial(_attend_kernel, of=_Call(group, block, interpret, how.scale)),
    grid=(batch, kv_heads, splits),
    in_specs=[
      _A_ROW,
      _of_head(_rows(group), head_dim),
      tuple(map(_new, token)),
      tuple(_cached(x, split) for x in cached),
    ],
    out_specs=[
      _Made(
        _of_program(_rows(group), width),
        _of_program(_rows(group)),
        tuple(_cached(x, split) for x in cached),
        _weights(_rows(group), split) if how.with_weights else None,
      )
    ],
    out_shape=[
      _Made(
        jax.ShapeDtypeStruct((batch, kv_heads, splits, group, width), _part_dtype(q, splits, pages)),
        jax.ShapeDtypeStruct((batch, kv_heads, splits, group), jnp.float32),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cached),
        jax.ShapeDtypeStruct((batch, kv_heads, group, slots), jnp.float32) if how.with_weights else None,
      )
    ],
    input_output_aliases={before + leaf: 2 + leaf for leaf in range(len(jax.tree.leaves(cached)))},
    compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=stages),
    interpret=interpret,
    name="flash_decode",
  )(positions, q.reshape(batch, kv_heads, group, head_dim), token, cached)
  out, weights = joined(Partial(made.out, made.log_total, made.scores), rows, q.dtype)
  return out, weights, made.cached


def follow(
  weights: jax.Array,
  new_value: jax.Array,
  values: Stored,
  positions: jax.Array,
  pages: Pages | None = None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, Stored]:
  """Adds one new token's value per row to the cache and computes a follower's attention.

  Args:
    weights: the anchor's, ``[B, N, S]``; with pages ``[P, N, S]``.
    new_value: ``[B, K, R]``.
    values: ``[B, K, S, R]``; with pages ``[P, K, S, R]``.
    positions: int32 ``[B]``, the slot for each row's token.
    pages: page tables of a paged cache, or None.
    interpret: run the kernel in Pallas's interpreter, on any device.

  Returns:
    The output ``[B, N, R]`` in the dtype of the weights, and the updated values.
  """
  if pages is not None:
    new_value, positions = pages.of_rows(new_value), pages.offsets(positions)
  batch, heads, slots = weights.shape
  kv_heads, width = new_value.shape[1:]
  group = heads // kv_heads
  # About 500 programs are fastest on an H200, more than for an anchor.
  split = choose_split(batch * kv_heads, slots, programs=3 * _PROCESSORS, longest=4096)
  splits = slots // split
  token = as_stored(new_value, values)
  before = 2 + len(jax.tree.leaves(token))
  [(out, values)] = pl.pallas_call(
    functools.partial(_follow_kernel, of=_Call(group, BLOCK, interpret)),
    grid=(batch, kv_heads, splits),
    in_specs=[_A_ROW, _weights(_rows(group), split), _new(token), _cached(values, split)],
    out_specs=[(_of_program(_rows(group), width), _cached(values, split))],
    out_shape=[
      (
        jax.ShapeDtypeStruct((batch, kv_heads, splits, group, width), _part_dtype(weights, splits, pages)),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values),
      )
    ],
    input_output_aliases={before + leaf: 1 + leaf for leaf in range(len(jax.tree.leaves(values)))},
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name="flash_follow",
  )(positions, weights.reshape(batch, kv_heads, group, slots), token, values)
  out = out.sum(axis=2).reshape(batch, heads, width)
  return (out if pages is None else pages.summed(out)).astype(weights.dtype), values


def _part_dtype(like: jax.Array, splits: int, pages: Pages | None) -> jnp.dtype:
  """The dtype of a program's output: float32 if it is a partial sum of a row."""
  return like.dtype if splits == 1 and pages is None else jnp.dtype(jnp.float32)


def _rows(group: int) -> int:
  """Rows of a matrix product: the heads of a group, padded."""
  return max(_MIN_ROWS, pl.next_power_of_2(group))


# Block specs of a program ``(row, KV head, split)``. A quantised cache has one spec for its numbers and one for scales.
_A_ROW = pl.BlockSpec((None,), lambda b, k, s: (b,))


def _of_head(*shape: int) -> pl.BlockSpec:
  return pl.BlockSpec((None, None, *shape), lambda b, k, s: (b, k, *(0 for _ in shape)))


def _of_program(*shape: int) -> pl.BlockSpec:
  return pl.BlockSpec((None, None, None, *shape), lambda b, k, s: (b, k, s, *(0 for _ in shape)))


def _weights(rows: int, split: int) -> pl.BlockSpec:
  return pl.BlockSpec((None, None, rows, split), lambda b, k, s: (b, k, 0, s))


def _new(token: Stored) -> Any:
  return jax.tree.map(lambda x: _of_head(x.shape[-1]), token)


def _cached(cache: Stored, split: int) -> Any:
  spec = lambda size: pl.BlockSpec((None, None, split, size), lambda b, k, s: (b, k, s, 0))
  return jax.tree.map(lambda x: spec(x.shape[-1]), cache)


def choose_split(rows: int, slots: int, programs: int, longest: int) -> int:
  """Slots per program: `BLOCK` doubled while it divides ``slots``, is within ``longest`` and gives enough programs."""
  split = BLOCK
  while slots % (2 * split) == 0 and 2 * split <= longest and rows * (slots // (2 * split)) >= programs:
    split *= 2
  return split


_Carry = tuple[list[jax.Array], jax.Array, jax.Array, tuple[Scales, Scales]]


class _Call(NamedTuple):
  """Static options of a kernel.

  Attributes:
    group: ``G``, query heads per KV head.
    size: slots per block.
    interpret: whether the kernel is interpreted.
    scale: an anchor's factor of ``q kᵀ``.
  """

  group: int
  size: int
  interpret: bool
  scale: float = 1.0


class _Made(NamedTuple):
  """Outputs of an anchor's kernel.

  Attributes:
    out: ``[B, K, P, G, R]``, of P parts of a row.
    log_total: ``[B, K, P, G]``.
    cached: keys and values.
    scores: ``[B, K, G, S]``, or None.
  """

  out: Tree
  log_total: Tree
  cached: tuple[Tree, Tree]
  scores: Tree


def _attend_kernel(
  position_ref: jax.Ref,
  q_ref: jax.Ref,
  new: tuple[Stored | jax.Ref, Stored | jax.Ref],
  cached: tuple[Stored | jax.Ref, Stored | jax.Ref],
  made: _Made,
  *,
  of: _Call,
) -> None:
  (new_key_ref, new_value_ref), (key_ref, value_ref) = new, cached
  group, size = of.group, of.size
  rows, split = q_ref.shape[0], jax.tree.leaves(key_ref)[0].shape[0]
  at = position_ref[...] - pl.program_id(2) * split  # the new token's slot, relative to this program's first
  kept = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < group
  q = [plgpu.load(part, mask=_kept(part, group), other=0.0) for part in parts_of(q_ref, key_ref)]

  def block(index: jax.Array, carry: _Carry) -> _Carry:
    accumulated, maximum, total, (key_scales, value_scales) = carry
    here, ahead = pl.ds(index * size, size), jnp.minimum(index + 1, blocks - 1)
    next_scales = scales_of(key_ref, ahead, size), scales_of(value_ref, ahead, size)
    k = block_of(key_ref, here, q_ref.dtype, of.interpret)
    scores = times_scales(sum(plgpu.dot(a, b.T) for a, b in zip(q, k, strict=True)) * of.scale, key_scales)
    before = _before(at, index, (rows, size))
    if made.scores is not None:
      plgpu.store(made.scores.at[:, here], scores, mask=kept[:, None] & before)
    scores = jnp.where(before, scores, MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1))
    weights = jnp.exp(scores - new_maximum[:, None])
    shrink = jnp.exp(maximum - new_maximum)
    v = block_of(value_ref, here, product_dtype(value_ref, q_ref.dtype), of.interpret)
    scaled = times_scales(weights, value_scales).astype(v[0].dtype)
    accumulated = [a * shrink[:, None] + plgpu.dot(scaled, b) for a, b in zip(accumulated, v, strict=True)]
    return accumulated, new_maximum, total * shrink + weights.sum(axis=1), next_scales

  blocks = _blocks(at, split, size)
  outs = parts_of(made.out, value_ref)
  start = (
    [jnp.zeros(out.shape, jnp.float32) for out in outs],
    jnp.full((rows,), MASKED, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
    (scales_of(key_ref, 0, size), scales_of(value_ref, 0, size)),
  )
  accumulated, maximum, total, _ = jax.lax.fori_loop(0, blocks, block, start)

  # The new token is added from registers, so that the loop above only reads the cache and can be pipelined.
  mine = (at >= 0) & (at < split)
  products = zip(q, floats_of(new_key_ref), strict=True)
  score = sum((a.astype(jnp.float32) * b[None, :]).sum(axis=1) for a, b in products) * of.scale
  score = jnp.where(mine, score, MASKED)
  new_maximum = jnp.maximum(maximum, score)
  weight, shrink = jnp.where(mine, jnp.exp(score - new_maximum), 0.0), jnp.exp(maximum - new_maximum)
  maximum, total = new_maximum, total * shrink + weight
  # A split past the row's end has no visible slot. Its share of the result is zero, but must be finite.
  whole = jnp.where(total > 0, total, 1.0)[:, None]
  for out, before, value in zip(outs, accumulated, floats_of(new_value_ref), strict=True):
    mean = (before * shrink[:, None] + weight[:, None] * value[None, :]) / whole
    plgpu.store(out, mean.astype(out.dtype), mask=_kept(out, group))
  plgpu.store(made.log_total, maximum + jnp.log(total), mask=kept)

  slot = jnp.clip(at, 0, split - 1)
  if made.scores is not None:
    plgpu.store(made.scores.at[:, slot], score, mask=kept & mine)
  for into, token in zip(made.cached, new, strict=True):
    _write(into, token, slot, mine)


def _follow_kernel(
  position_ref: jax.Ref,
  weights_ref: jax.Ref,
  new_value_ref: Stored | jax.Ref,
  value_ref: Stored | jax.Ref,
  made: tuple[jax.Ref, Stored | jax.Ref],
  *,
  of: _Call,
) -> None:
  (rows, split), group, (out_ref, value_out_ref) = weights_ref.shape, of.group, made
  new = position_ref[...] - pl.program_id(2) * split
  kept = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0) < group

  def block(index: jax.Array, carry: tuple[list[jax.Array], Scales]) -> tuple[list[jax.Array], Scales]:
    accumulated, scales = carry
    here, next_scales = pl.ds(index * BLOCK, BLOCK), scales_of(value_ref, jnp.minimum(index + 1, blocks - 1), BLOCK)
    weights = plgpu.load(weights_ref.at[:, here], mask=kept[:, None] & _before(new, index, (rows, BLOCK)), other=0.0)
    v = block_of(value_ref, here, product_dtype(value_ref, weights.dtype), of.interpret)
    scaled = times_scales(weights.astype(jnp.float32), scales).astype(v[0].dtype)
    return [a + plgpu.dot(scaled, b) for a, b in zip(accumulated, v, strict=True)], next_scales

  blocks = _blocks(new, split, BLOCK)
  outs = parts_of(out_ref, value_ref)
  start = [jnp.zeros(out.shape, jnp.float32) for out in outs], scales_of(value_ref, 0, BLOCK)
  accumulated, _ = jax.lax.fori_loop(0, blocks, block, start)
  mine, slot = (new >= 0) & (new < split), jnp.clip(new, 0, split - 1)
  weight = plgpu.load(weights_ref.at[:, slot], mask=kept & mine, other=0.0).astype(jnp.float32)
  for out, before, value in zip(outs, accumulated, floats_of(new_value_ref), strict=True):
    plgpu.store(out, (before + weight[:, None] * value[None, :]).astype(out.dtype), mask=_kept(out, group))
  _write(value_out_ref, new_value_ref, slot, mine)


def _blocks(new: jax.Array, split: int, size: int) -> jax.Array:
  """The number of a program's blocks, of ``size`` slots each, with slots before the new token's."""
  return jnp.clip(pl.cdiv(new, size), 0, split // size)


def _before(new: jax.Array, index: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Mask of a block's slots before the new token's, ``[rows, size]``."""
  return index * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < new


def _write(cache_ref: Stored | jax.Ref, new_ref: Stored | jax.Ref, slot: jax.Array, mine: jax.Array) -> None:
  """Writes the new token's vector into its slot, if this program owns it."""
  for into, ref in zip(jax.tree.leaves(cache_ref), jax.tree.leaves(new_ref), strict=True):
    plgpu.store(into.at[slot, :], ref[...], mask=jnp.broadcast_to(mine, ref.shape))


def _kept(ref: jax.Ref, group: int) -> jax.Array:
  """Mask of the rows of ``[rows, n]`` that belong to a head; the others are padding."""
  return jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0) < group
