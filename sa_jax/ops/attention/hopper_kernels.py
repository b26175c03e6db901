"""Kernels of a group's shared backward pass on Hopper GPUs (H100, H200), in Pallas Mosaic GPU.

A program has two warpgroups that compute, and one that prefetches blocks into a ring buffer in shared memory. Importing
this module takes half a second, so `sa_jax.ops.attention.hopper` imports it lazily.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.typing import DTypeLike

from sa_jax.trees import Tree

BLOCK, _HALF = 128, 64
"""Queries (and keys) per block, and per warpgroup."""
WIDE = 256
"""Keys per block in `d_scores`."""
_PART = 64
"""Elements of the head dimension per block in `d_scores`."""
_LOG2_E = math.log2(math.e)
_WARPGROUPS: dict[str, Tree] = {
  "num_threads": 3,
  "thread_name": "warpgroup",
  "compiler_params": mosaic.CompilerParams(approx_math=True),
}


def d_values(q: jax.Array, k: jax.Array, log_sums: jax.Array, d_out: jax.Array, scale: float) -> jax.Array:
  """``Pᵀ dO`` of full causal rows, summed over the query heads of each KV head.

  Args:
    q: ``[B, T, N, H]``, T a multiple of `BLOCK`.
    k: ``[B, T, K, H]``.
    log_sums: float32 ``[B, N, T]``.
    d_out: ``[B, T, N, H]``.
    scale: factor of ``q kᵀ``.

  Returns:
    ``[B, T, K, H]``.
  """
  (batch, length, heads, width), kv_heads = q.shape, k.shape[2]
  group, blocks = heads // kv_heads, length // BLOCK

  def kernel(*refs: jax.Ref) -> None:
    q_ref, k_ref, sums_ref, d_out_ref, d_v_ref, *shared = refs
    keys, queries, d_outs, sums, keys_here, here, d_here, free, d_free = shared
    head, block, row, me = map(jax.lax.axis_index, ("head", "block", "row", "warpgroup"))
    seeing = blocks - block  # number of query blocks that see these keys
    steps = group * seeing

    @pl.when(me == 2)
    def _() -> None:
      def fetch(step: jax.Array, slot: jax.Array, wait: bool) -> None:
        of, at = head * group + jax.lax.div(step, seeing), (block + jax.lax.rem(step, seeing)) * BLOCK
        of_block = (row, pl.ds(at, BLOCK), of)
        pl.when(wait)(lambda: mosaic.barrier_wait(free.at[slot]))
        mosaic.copy_gmem_to_smem(q_ref.at[of_block], queries.at[slot], here.at[slot])
        mosaic.copy_gmem_to_smem(sums_ref.at[row, of, pl.ds(at, BLOCK)], sums.at[slot], here.at[slot])
        pl.when(wait)(lambda: mosaic.barrier_wait(d_free.at[slot]))
        mosaic.copy_gmem_to_smem(d_out_ref.at[of_block], d_outs.at[slot], d_here.at[slot])

      _fill(fetch, steps, slots=2)

    @pl.when(me < 2)
    def _() -> None:
      mosaic.set_max_registers(232, action="increase")
      first, mine = block * BLOCK + me * _HALF, keys.at[me]
      mosaic.copy_gmem_to_smem(k_ref.at[row, pl.ds(first, _HALF), head], mine, keys_here.at[me])
      mosaic.barrier_wait(keys_here.at[me])

      def step(index: jax.Array, d_v: jax.Array) -> jax.Array:
        slot = jax.lax.rem(index, jnp.int32(2))
        mosaic.barrier_wait(here.at[slot])
        # Transposed, [keys, queries], so that the weights can be an operand without a transpose.
        scores = _plus_product(_zeros(_HALF, BLOCK), mine, queries.at[slot].transpose((1, 0)))
        of_queries = _load(sums.at[slot], mosaic.Layout.WGMMA.reduce(0))
        mosaic.barrier_arrive(free.at[slot])
        weights = jnp.exp2(scores * (scale * _LOG2_E) - jax.lax.broadcast_in_dim(of_queries, scores.shape, [1]))
        seen = lambda x: jnp.where(_iota(x, 1) >= _iota(x, 0) + me * _HALF, x, 0.0)
        weights = jax.lax.cond(jax.lax.rem(index, seeing) == 0, seen, lambda x: x, weights)
        mosaic.barrier_wait(d_here.at[slot])
        d_v = _plus_product(d_v, weights.astype(q.dtype), d_outs.at[slot])
        mosaic.barrier_arrive(d_free.at[slot])
        return d_v

      d_v = jax.lax.fori_loop(0, steps, step, _zeros(_HALF, width))
      _store(d_v, mine, d_v_ref.at[row, pl.ds(first, _HALF), head])

  return mosaic.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(k.shape, k.dtype),
    scratch_types=[
      _shared(q.dtype, 2, _HALF, width),
      *[_shared(q.dtype, 2, BLOCK, width)] * 2,
      mosaic.SMEM((2, BLOCK), jnp.float32),
      mosaic.Barrier(num_barriers=2),
      mosaic.Barrier(num_arrivals=2, num_barriers=2),
      mosaic.Barrier(num_barriers=2),
      *[mosaic.Barrier(num_arrivals=2, num_barriers=2)] * 2,
    ],
    grid=(kv_heads, blocks, batch),
    grid_names=("head", "block", "row"),
    **_WARPGROUPS,
  )(q, k, log_sums * _LOG2_E, d_out)


def d_scores(
  heads: tuple[jax.Array, jax.Array],
  layers: tuple[jax.Array, jax.Array],
  of_queries: tuple[jax.Array, jax.Array],
  scale: float,
) -> jax.Array:
  """The gradients of one head's scores, ``scale * P ∘ (Σ_l dO_l V_lᵀ - D)``.

  Args:
    heads: queries ``[T, H]``, the last T of the row, and keys ``[S, H]``; T and S are multiples of `WIDE`.
    layers: output gradients ``[L, T, R]`` and values ``[L, S, R]``.
    of_queries: D and the log-sum-exp, float32 ``[T]`` each.
    scale: factor of ``q kᵀ``.

  Returns:
    ``[T, S]`` in the dtype of the queries.
  """
  (length, width), keys, dtype = heads[0].shape, heads[1].shape[0], heads[0].dtype
  parts, slots = width // _PART, 3
  steps = (layers[0].shape[0] + 1) * parts
  blocks, offset = length // BLOCK, keys - length
  # Programs that run at the same time read nearby blocks, for cache locality.
  near = math.gcd(8, blocks)

  def kernel(*refs: jax.Ref) -> None:
    q_ref, k_ref, d_ref, v_ref, inner_ref, sums_ref, *rest = refs
    out_ref, left, right, out, of_queries, here, free, queries_here = rest
    outer, key, inner, me = map(jax.lax.axis_index, ("outer", "key", "inner", "warpgroup"))
    query = outer * near + inner
    slot_in, end = offset + query * BLOCK, (key + 1) * WIDE  # the first query's slot, and one past the last key's
    seen = key * WIDE < slot_in + BLOCK

    @pl.when(seen & (me == 2))
    def _() -> None:
      def fetch(step: jax.Array, slot: jax.Array, wait: bool) -> None:
        layer, part = jax.lax.div(step, parts) - 1, pl.ds(jax.lax.rem(step, parts) * _PART, _PART)
        pl.when(wait)(lambda: mosaic.barrier_wait(free.at[slot]))
        of_q, of_k = pl.ds(query * BLOCK, BLOCK), pl.ds(key * WIDE, WIDE)

        @pl.when(layer < 0)
        def _() -> None:
          mosaic.copy_gmem_to_smem(q_ref.at[of_q, part], left.at[slot], here.at[slot])
          mosaic.copy_gmem_to_smem(k_ref.at[of_k, part], right.at[slot], here.at[slot])

        @pl.when(layer >= 0)
        def _() -> None:
          mosaic.copy_gmem_to_smem(d_ref.at[layer, of_q, part], left.at[slot], here.at[slot])
          mosaic.copy_gmem_to_smem(v_ref.at[layer, of_k, part], right.at[slot], here.at[slot])

      _fill(fetch, steps, slots)

    @pl.when(seen & (me < 2))
    def _() -> None:
      mosaic.set_max_registers(232, action="increase")
      first = query * BLOCK + me * _HALF
      for index, ref in enumerate((inner_ref, sums_ref)):
        mosaic.copy_gmem_to_smem(ref.at[pl.ds(first, _HALF)], of_queries.at[me, index], queries_here.at[me])
      mosaic.barrier_wait(queries_here.at[me])

      def step(index: jax.Array, product: jax.Array) -> jax.Array:
        slot = jax.lax.rem(index, jnp.int32(slots))
        mosaic.barrier_wait(here.at[slot])
        mine = left.at[slot, pl.ds(me * _HALF, _HALF)]
        product = _plus_product(product, mine, right.at[slot].transpose((1, 0)))
        mosaic.barrier_arrive(free.at[slot])
        return product

      scores = jax.lax.fori_loop(0, parts, step, _zeros(_HALF, WIDE))
      inner, sums = (
        jax.lax.broadcast_in_dim(_load(of_queries.at[me, index], mosaic.Layout.WGMMA.reduce(1)), scores.shape, [0])
        for index in range(2)
      )
      weights = jnp.exp2(scores * (scale * _LOG2_E) - sums)
      visible = lambda x: jnp.where(_iota(x, 0) + offset + first >= _iota(x, 1) + key * WIDE, x, 0.0)
      # Half precision frees registers for the following products.
      weights = jax.lax.cond(end > slot_in, visible, lambda x: x, weights).astype(dtype)
      d_weights = jax.lax.fori_loop(parts, steps, step, _zeros(_HALF, WIDE))
      d_scores = weights.astype(jnp.float32) * (d_weights - inner) * scale
      _store(d_scores, out.at[me], out_ref.at[pl.ds(first, _HALF), pl.ds(key * WIDE, WIDE)])

    @pl.when(~seen & (me < 2))
    def _() -> None:
      first = query * BLOCK + me * _HALF
      _store(_zeros(_HALF, WIDE), out.at[me], out_ref.at[pl.ds(first, _HALF), pl.ds(key * WIDE, WIDE)])

  return mosaic.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((length, keys), dtype),
    scratch_types=[
      _shared(dtype, slots, BLOCK, _PART),
      _shared(dtype, slots, WIDE, _PART),
      _shared(dtype, 2, _HALF, WIDE),
      mosaic.SMEM((2, 2, _HALF), jnp.float32),
      *[mosaic.Barrier(num_arrivals=2, num_barriers=slots)] * 2,
      mosaic.Barrier(num_arrivals=2, num_barriers=2),
    ],
    grid=(near, keys // WIDE, blocks // near),
    grid_names=("inner", "key", "outer"),
    **_WARPGROUPS,
  )(*heads, *layers, of_queries[0], of_queries[1] * _LOG2_E)


def _fill(fetch: Callable[[jax.Array, jax.Array, bool], None], steps: jax.Array | int, slots: int) -> None:
  """Fetches the data of each step into the ring buffer, and waits for free slots once it is full."""
  mosaic.set_max_registers(40, action="decrease")
  for step in range(slots):
    pl.when(step < steps)(functools.partial(fetch, jnp.int32(step), jnp.int32(step), False))
  pl.loop(slots, jnp.maximum(steps, slots))(lambda step: fetch(step, jax.lax.rem(step, jnp.int32(slots)), True))


def _plus_product(sum_: jax.Array, a: jax.Array | jax.Ref, b: jax.Ref) -> jax.Array:
  """Adds a product to a sum in registers; b is in shared memory, a in registers or shared memory."""
  return pl.run_state(lambda ref: mosaic.wgmma(ref, a, b))(mosaic.ACC.init(sum_))  # type: ignore[attr-defined]


def _store(x: jax.Array, shared: Tree, ref: Tree) -> None:
  """Writes a warpgroup's registers to global memory through shared memory."""
  shared[...] = x.astype(shared.dtype)
  mosaic.commit_smem()
  mosaic.copy_smem_to_gmem(shared, ref)
  mosaic.wait_smem_to_gmem(0)


_INDEX = [()] if "idx" in inspect.signature(mosaic.load).parameters else []
"""The index argument that `mosaic.load` needs before JAX 0.12."""


def _load(ref: Tree, layout: Tree) -> jax.Array:
  """Loads an array from shared memory into a warpgroup's registers."""
  return mosaic.load(ref, *_INDEX, layout=layout)


def _zeros(*shape: int) -> jax.Array:
  return mosaic.layout_cast(jnp.full(shape, 0, jnp.float32), mosaic.Layout.WGMMA)


def _iota(like: jax.Array, axis: int) -> jax.Array:
  return mosaic.broadcasted_iota(jnp.int32, like.shape, axis, layout=mosaic.Layout.WGMMA)


def _shared(dtype: DTypeLike, *shape: int) -> Tree:
  """Shared memory in the tiled and swizzled layout of tensor cores."""
  return mosaic.SMEM(shape, dtype, transforms=(mosaic.TilingTransform((8, 64)), mosaic.SwizzleTransform(128)))
