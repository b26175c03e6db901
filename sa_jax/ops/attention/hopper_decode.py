"""Decode attention in Pallas Mosaic GPU for Hopper GPUs (H100, H200); the same interface as `flash_decode`.

A program is one warpgroup that prefetches blocks of keys and values into a ring buffer. Products have slots as rows and
queries as columns: scores are ``K Qᵀ`` and the output is ``Vᵀ P``, both transposed. Hopper's tensor cores multiply 64
rows by a multiple of 8 columns, so this avoids padding the few queries to 64. Importing this module takes half a
second, so it is imported lazily.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from sa_jax.ops.attention.flash_decode import How, choose_split
from sa_jax.ops.attention.hopper_blocks import (
  Side,
  columns_of,
  filled,
  of_a_head,
  of_all_slots,
  product,
  shared_memory,
  side_memory,
  slots_of,
  start_fetching,
  store_columns,
)
from sa_jax.ops.attention.joined import Partial, joined
from sa_jax.ops.attention.pages import Pages
from sa_jax.ops.attention.reference import MASKED
from sa_jax.ops.attention.rows import Rows
from sa_jax.ops.quantize import Quantised, Stored, as_stored, product_dtype
from sa_jax.trees import Tree

_COLUMNS = 8
"""The number of columns (queries) of a product is a multiple of this."""
_LOG2_E = math.log2(math.e)
_PROCESSORS = 132
_OF_QUERIES = mosaic.Layout.WGMMA.reduce(0)
"""Register layout of per-query numbers."""


class Tiling(NamedTuple):
  """Tuning parameters of a decode kernel.

  Attributes:
    block: slots per block.
    stages: pipeline depth, in blocks.
    longest: maximum number of slots per program.
    programs: minimum number of programs, if the cache has enough blocks.
  """

  block: int = 64
  stages: int = 3
  longest: int = 2048
  programs: int = _PROCESSORS * 3 // 4


_INTERPRETER: Callable[[], object] | None = getattr(mosaic, "InterpretGPUParams", None)
CAN_INTERPRET = _INTERPRETER is not None
"""Whether these kernels can be interpreted on any device, which needs JAX 0.11."""
TILING = FOLLOWING = Tiling()
"""For anchors, and for followers."""


def attend(
  q: jax.Array,
  new: tuple[jax.Array, jax.Array],
  cached: tuple[Stored, Stored],
  rows: Rows,
  how: How,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None, tuple[Stored, Stored]]:
  """`flash_decode.attend` for caches in q's dtype or int8, with a head dimension that is a multiple of 64."""
  assert rows.offset is not None, "a new token has a slot in the cache"
  positions, pages = rows.offset, rows.pages
  if pages is not None:
    q, new = pages.of_rows(q), (pages.of_rows(new[0]), pages.of_rows(new[1]))
    positions = pages.offsets(positions)
  (keys, values), (batch, heads, width), wide = cached, q.shape, new[1].shape[2]
  kv_heads, slots = jax.tree.leaves(keys)[0].shape[1:3]
  group, tiling = heads // kv_heads, TILING
  columns = pl.cdiv(group, _COLUMNS) * _COLUMNS
  block = math.gcd(slots, tiling.block)
  split = max(block, choose_split(batch * kv_heads, slots, tiling.programs, tiling.longest))
  splits, stages, scale = slots // split, min(tiling.stages, split // block), how.scale * _LOG2_E
  of_weights = product_dtype(values, q.dtype)

  def kernel(*refs: Tree) -> None:
    positions_ref, q_ref, new_key_ref, new_value_ref, keys_ref, values_ref, out_ref, sums_ref, *for_weights = refs
    score_ref, scores_ref = for_weights or (None, None)
    row, head, part = map(jax.lax.axis_index, ("row", "head", "part"))
    first = part * split
    new = positions_ref[row] - first  # the new token's slot, relative to this program's first
    blocks = jax.lax.div(jnp.clip(new, 0, split) + (block - 1), block)  # with slots before the new token's
    mine = new < split  # given new >= 0

    def within(*shared: Tree) -> None:
      given, queries, weights, sums, given_here, of_keys, of_values = shared
      keys = Side(of_a_head(keys_ref, row, head), of_a_head(new_key_ref, row, head), first, *of_keys)
      values = Side(of_a_head(values_ref, row, head), of_a_head(new_value_ref, row, head), first, *of_values)
      mosaic.copy_gmem_to_smem(q_ref.at[row, pl.ds(head * group, group)], given.at[pl.ds(0, group)], given_here)
      mosaic.copy_gmem_to_smem(keys.new[0], keys.token, given_here)
      mosaic.copy_gmem_to_smem(values.new[0], values.token, given_here)
      start_fetching((keys.fetch, values.fetch), stages, blocks)
      mosaic.barrier_wait(given_here)
      of_queries = columns_of(given)
      queries.transpose((1, 0))[...] = of_queries
      mosaic.commit_smem()

      def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        summed, maximum, total = carry
        slot = jax.lax.rem(index, jnp.int32(stages))
        mosaic.barrier_wait(keys.here.at[slot])
        scores = keys.times_scales(product(keys.read(slot), queries.transpose((1, 0))) * scale, slot)
        pl.when(index + stages < blocks)(lambda: keys.fetch(index + stages))
        if scores_ref is not None:
          scores_ref.at[row, head, pl.ds(first + index * block, block)][...] = scores
        scores = jnp.where(slots_of(block, columns) + index * block < new, scores, MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(axis=0))
        chances, shrink = jnp.exp2(scores - of_all_slots(new_maximum, block)), jnp.exp2(maximum - new_maximum)
        mosaic.barrier_wait(values.here.at[slot])
        store_columns(values.times_scales(chances, slot), weights)
        added = product(values.read(slot).transpose((1, 0)), weights.transpose((1, 0)))
        pl.when(index + stages < blocks)(lambda: values.fetch(index + stages))
        summed, total = (x * of_all_slots(shrink, x.shape[0]) for x in (summed, total))
        return summed + added, new_maximum, total + chances

      none = mosaic.layout_cast(jnp.full((columns,), MASKED, jnp.float32), _OF_QUERIES)
      start = filled(0, wide, columns), none, filled(0, block, columns)
      summed, maximum, total = jax.lax.fori_loop(0, blocks, step, start)

      # The new token is added from registers, and written after the cache has been read.
      def join(summed: jax.Array, maximum: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
        keys.write(new)
        values.write(new)
        numbers = mosaic.layout_cast(of_queries, mosaic.Layout.WGMMA).astype(jnp.float32)
        score = (numbers * keys.floats(columns)).sum(axis=0) * scale
        if score_ref is not None:
          sums[...] = score
          mosaic.commit_smem()
          mosaic.copy_smem_to_gmem(sums, score_ref.at[row, head])
          mosaic.wait_smem_to_gmem(0, wait_read_only=True)
        new_maximum = jnp.maximum(maximum, score)
        weight, shrink = jnp.exp2(score - new_maximum), jnp.exp2(maximum - new_maximum)
        added = values.floats(columns) * of_all_slots(weight, wide)
        return summed * of_all_slots(shrink, wide) + added, new_maximum, total * shrink + weight

      carry = summed, maximum, total.sum(axis=0)
      summed, maximum, total = jax.lax.cond(mine, join, lambda *carry: carry, *carry)
      out_ref.at[row, head, part][...] = summed / of_all_slots(total, wide)
      sums[...] = (maximum + jnp.log2(total)) / _LOG2_E
      mosaic.commit_smem()
      mosaic.copy_smem_to_gmem(sums, sums_ref.at[row, head, part])
      mosaic.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(new >= 0)
    def _() -> None:
      pl.run_scoped(
        within,
        mosaic.SMEM((columns, width), q.dtype),
        shared_memory(q.dtype, columns, width),
        shared_memory(of_weights, columns, block),
        mosaic.SMEM((columns,), jnp.float32),
        mosaic.Barrier(num_arrivals=3),
        side_memory(cached[0], (stages, block, width), q.dtype),
        side_memory(cached[1], (stages, block, wide), of_weights),
      )

    @pl.when(new < 0)  # no visible slot
    def _() -> None:
      out_ref.at[row, head, part][...] = filled(0, wide, columns)

  array = lambda *shape: jax.ShapeDtypeStruct((batch, kv_heads, *shape, columns), jnp.float32)
  out_type = [array(splits, wide), array(splits), *([array(), array(slots)] if how.with_weights else [])]
  call = _call(kernel, out_type, (batch, kv_heads, splits), "hopper_decode", interpret)
  given = positions, q, *(_leaves(as_stored(x, stored)) for x, stored in zip(new, cached, strict=True))
  (out, sums, *scores), (keys, values) = _in_place(call, given, cached)
  of_group, end = lambda x: jnp.swapaxes(x[..., :group], -1, -2), positions[:, None, None, None]
  seen = jax.lax.broadcasted_iota(jnp.int32, (1, 1, splits, 1), 2) * split <= end
  parts = Partial(of_group(out), jnp.where(seen, sums[..., :group], -jnp.inf), None)
  if how.with_weights:
    of_new = jax.lax.broadcasted_iota(jnp.int32, (1, 1, slots, 1), 2) == end
    parts = parts._replace(scores=of_group(jnp.where(of_new, scores[0][:, :, None], scores[1])) / _LOG2_E)
  out, attention = joined(parts, rows, q.dtype)
  return out, attention, (keys, values)


def follow(
  weights: jax.Array,
  new_value: jax.Array,
  values: Stored,
  positions: jax.Array,
  pages: Pages | None = None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, Stored]:
  """`flash_decode.follow` for a cache in the weights' dtype or int8, with a head dimension that is a multiple of 64."""
  if pages is not None:
    new_value, positions = pages.of_rows(new_value), pages.offsets(positions)
  (batch, heads, slots), (kv_heads, wide) = weights.shape, new_value.shape[1:]
  group, tiling, dtype = heads // kv_heads, FOLLOWING, product_dtype(values, weights.dtype)
  columns = pl.cdiv(group, _COLUMNS) * _COLUMNS
  block = math.gcd(slots, tiling.block)
  split = max(block, choose_split(batch * kv_heads, slots, tiling.programs, tiling.longest))
  splits, stages, cached = slots // split, min(tiling.stages, split // block), values

  def kernel(*refs: Tree) -> None:
    positions_ref, weights_ref, new_value_ref, values_ref, out_ref = refs
    row, head, part = map(jax.lax.axis_index, ("row", "head", "part"))
    first = part * split
    new = positions_ref[row] - first
    blocks = jnp.minimum(jax.lax.div(new, block) + 1, split // block)  # up to and including the new token's
    mine = new < split

    def within(*shared: Tree) -> None:
      given, weights, given_here, token_here, of_values = shared
      values = Side(of_a_head(values_ref, row, head), of_a_head(new_value_ref, row, head), first, *of_values)

      def fetch(index: jax.Array | int) -> None:
        slot, here = jax.lax.rem(index, stages), pl.ds(first + index * block, block)
        of_head = weights_ref.at[row, pl.ds(head * group, group), here]
        mosaic.copy_gmem_to_smem(of_head, given.at[slot, pl.ds(0, group)], given_here.at[slot])
        values.fetch(index)

      mosaic.copy_gmem_to_smem(values.new[0], values.token, token_here)
      start_fetching((fetch,), stages, blocks)

      def step(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        summed, of_new = carry
        slot = jax.lax.rem(index, jnp.int32(stages))
        mosaic.barrier_wait(given_here.at[slot])
        numbers = mosaic.layout_cast(columns_of(given.at[slot]), mosaic.Layout.WGMMA).astype(jnp.float32)
        found = jnp.where(slots_of(block, columns) + index * block == new, numbers, 0.0)
        mosaic.barrier_wait(values.here.at[slot])
        store_columns(values.times_scales(numbers - found, slot), weights)
        summed = summed + product(values.read(slot).transpose((1, 0)), weights.transpose((1, 0)))
        pl.when(index + stages < blocks)(lambda: fetch(index + stages))
        return summed, of_new + found

      summed, of_new = jax.lax.fori_loop(0, blocks, step, (filled(0, wide, columns), filled(0, block, columns)))
      mosaic.barrier_wait(token_here)

      def join(summed: jax.Array) -> jax.Array:
        values.write(new)
        return summed + values.floats(columns) * of_all_slots(of_new.sum(axis=0), wide)

      out_ref.at[row, head, part][...] = jax.lax.cond(mine, join, lambda x: x, summed)
      mosaic.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(new >= 0)
    def _() -> None:
      pl.run_scoped(
        within,
        mosaic.SMEM((stages, columns, block), weights.dtype),
        shared_memory(dtype, columns, block),
        mosaic.Barrier(num_barriers=stages),
        mosaic.Barrier(),
        side_memory(cached, (stages, block, wide), dtype),
      )

    @pl.when(new < 0)
    def _() -> None:
      out_ref.at[row, head, part][...] = filled(0, wide, columns)

  out_type = [jax.ShapeDtypeStruct((batch, kv_heads, splits, wide, columns), jnp.float32)]
  call = _call(kernel, out_type, (batch, kv_heads, splits), "hopper_follow", interpret)
  [out], [values] = _in_place(call, (positions, weights, _leaves(as_stored(new_value, values))), (values,))
  out = jnp.swapaxes(out.sum(axis=2)[..., :group], -1, -2).reshape(batch, heads, wide)
  return (out if pages is None else pages.summed(out)).astype(weights.dtype), values


def _leaves(stored: Stored) -> tuple[jax.Array, jax.Array | None]:
  """Stored vectors ``[…, H]``, and their scales ``[…]`` if quantised, else None."""
  return (stored.data, stored.scale) if isinstance(stored, Quantised) else (stored, None)


def _call(
  kernel: Callable[..., None], out_type: list[jax.ShapeDtypeStruct], grid: tuple[int, ...], name: str, interpret: bool
) -> Callable[..., list[jax.Array]]:
  mesh = mosaic.Mesh(grid=grid, grid_names=("row", "head", "part"), kernel_name=name)
  return pl.kernel(
    kernel,
    out_type=out_type,
    mesh=mesh,
    compiler_params=mosaic.CompilerParams(approx_math=True),
    interpret=_interpreter() if interpret else False,
    name=name,
  )


def _interpreter() -> object:
  if _INTERPRETER is None:
    raise NotImplementedError(f"JAX {jax.__version__} cannot interpret these kernels; JAX 0.11 can")
  return _INTERPRETER()


def _in_place(
  call: Callable[..., list[jax.Array]], given: tuple[Tree, ...], cached: tuple[Stored, ...]
) -> tuple[list[jax.Array], list[Stored]]:
  """Calls a kernel that updates caches in place, with scales as ``[B, K, S]``; returns its outputs and the caches."""
  flat = [jax.tree.map(lambda x: x.reshape(x.shape[:3]) if x.shape[3] == 1 else x, _leaves(each)) for each in cached]
  refs = jax.tree.map(jax.new_ref, flat)
  out = call(*given, *refs)
  left = [jax.tree.leaves(jax.tree.map(jax.freeze, each)) for each in refs]
  shaped = lambda before, after: jax.tree.unflatten(
    jax.tree.structure(before), [x.reshape(like.shape) for like, x in zip(jax.tree.leaves(before), after, strict=True)]
  )
  return out, list(map(shaped, cached, left))
