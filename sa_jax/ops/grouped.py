"""Grouped matrix products, each group of rows with its own weights: `jax.lax.ragged_dot`, with kernels.

On NVIDIA GPUs XLA multiplies all rows by the weights of every group. The kernels here (Pallas, Triton) multiply each
row once, forward and backward, in half precision; elsewhere, and in other precisions, XLA's version is used.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sa_jax.ops.kernels import has_gpu_kernels
from sa_jax.ops.kernels import triton as plgpu

_ROWS, _COLUMNS, _INNER = 128, 128, 64
"""Block sizes of a program's product. Its rows are one tile, which may span several groups."""
_TILES_TOGETHER = 8
"""Tiles whose rows stay in cache while all columns are computed."""


def grouped_product(x: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
  """Each row times the weights of its group.

  Args:
    x: ``[R, K]``, rows sorted by group; rows after the last group give zero.
    weights: ``[X, K, N]``.
    sizes: int32 ``[X]``, rows per group.

  Returns:
    ``[R, N]``.
  """
  if _takes(x, weights):
    return product_by_kernels(x, weights, sizes)
  return jax.lax.ragged_dot(x, weights, sizes)


def _takes(x: jax.Array, weights: jax.Array) -> bool:
  return (
    x.dtype in (jnp.bfloat16, jnp.float16)
    and weights.dtype == x.dtype
    and all(size % max(_COLUMNS, _INNER) == 0 for size in weights.shape[1:])
    and has_gpu_kernels(weights)
  )


def product_by_kernels(x: jax.Array, weights: jax.Array, sizes: jax.Array, interpret: bool = False) -> jax.Array:
  """`grouped_product` with the kernels; ``interpret`` runs them on any device, slowly."""
  rows = x.shape[0]
  padded = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
  return _product(padded, weights, sizes, interpret)[:rows]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: jax.Array, weights: jax.Array, sizes: jax.Array, interpret: bool) -> jax.Array:
  return _multiply(x, weights, sizes, False, interpret)


def _forward(
  x: jax.Array, weights: jax.Array, sizes: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  return _multiply(x, weights, sizes, False, interpret), (x, weights, sizes)


def _backward(
  interpret: bool, residuals: tuple[jax.Array, jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  x, weights, sizes = residuals
  return _multiply(d_out, weights, sizes, True, interpret), _of_weights(x, d_out, sizes, interpret), None


_product.defvjp(_forward, _backward)


def _tiles(rows: int, sizes: jax.Array) -> jax.Array:
  """The tiles of ``rows`` rows, a multiple of `_ROWS`, each listed once per group that has rows in it.

  Returns:
    int32 ``[4, T]``: the group (the number of groups for rows in no group, which become zero), the tile's first row,
    the group's first row in the tile, and its end; past the end of the list both are equal.
  """
  groups = sizes.shape[0]
  rest = rows - jnp.sum(sizes, dtype=jnp.int32)
  whole = jnp.concatenate([sizes.astype(jnp.int32), rest[None]])
  ends = jnp.cumsum(whole, dtype=jnp.int32)
  begins = ends - whole
  first = begins // _ROWS
  counts = jnp.where(whole > 0, (ends - 1) // _ROWS - first + 1, 0)
  listed = jnp.cumsum(counts, dtype=jnp.int32)
  places = jnp.arange(rows // _ROWS + groups, dtype=jnp.int32)
  group = jnp.sum(places[:, None] >= listed[None], axis=1, dtype=jnp.int32)
  is_real = group <= groups
  of = jnp.minimum(group, groups)
  start = (first[of] + places - (listed - counts)[of]) * _ROWS
  start = jnp.where(is_real, start, 0)
  low = jnp.maximum(start, begins[of])
  high = jnp.where(is_real, jnp.minimum(start + _ROWS, ends[of]), low)
  return jnp.stack([of, start, low, high])


def _multiply(x: jax.Array, weights: jax.Array, sizes: jax.Array, transposed: bool, interpret: bool) -> jax.Array:
  """``x weights[group]``, or with transposed weights; rows are padded to whole tiles."""
  rows = x.shape[0]
  columns = weights.shape[1 if transposed else 2]
  tiles = _tiles(rows, sizes)
  number = tiles.shape[1]
  whole = lambda array: pl.BlockSpec(array.shape, lambda i: (0,) * array.ndim)
  return pl.pallas_call(
    functools.partial(_multiply_kernel, transposed=transposed),
    grid=(number * (columns // _COLUMNS),),
    in_specs=[whole(tiles), whole(x), whole(weights)],
    out_specs=pl.BlockSpec((rows, columns), lambda i: (0, 0)),
    out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
    interpret=interpret,
    name="grouped_product",
  )(tiles, x, weights)


def _of_weights(x: jax.Array, d_out: jax.Array, sizes: jax.Array, interpret: bool) -> jax.Array:
  """``x_gᵀ d_out_g`` for every group ``g``."""
  (_, inner), columns, groups = x.shape, d_out.shape[1], sizes.shape[0]
  ends = jnp.cumsum(sizes, dtype=jnp.int32)
  begins = ends - sizes.astype(jnp.int32)
  whole = lambda array: pl.BlockSpec(array.shape, lambda i, j, g: (0,) * array.ndim)
  return pl.pallas_call(
    _of_weights_kernel,
    grid=(inner // _ROWS, columns // _COLUMNS, groups),
    in_specs=[
      whole(begins),
      whole(ends),
      pl.BlockSpec((x.shape[0], _ROWS), lambda i, j, g: (0, i)),
      pl.BlockSpec((x.shape[0], _COLUMNS), lambda i, j, g: (0, j)),
    ],
    out_specs=pl.BlockSpec((None, _ROWS, _COLUMNS), lambda i, j, g: (g, i, j)),
    out_shape=jax.ShapeDtypeStruct((groups, inner, columns), x.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
    interpret=interpret,
    name="grouped_product_weights",
  )(begins, ends, x, d_out)


def _multiply_kernel(
  tiles_ref: jax.Ref, x_ref: jax.Ref, weights_ref: jax.Ref, out_ref: jax.Ref, *, transposed: bool
) -> None:
  groups, inner = weights_ref.shape[0], x_ref.shape[1]
  number, blocks = tiles_ref.shape[1], out_ref.shape[1] // _COLUMNS
  program = pl.program_id(0)
  # A few tiles with all columns, then the next few.
  together = program // (_TILES_TOGETHER * blocks)
  left = jnp.minimum(number - together * _TILES_TOGETHER, _TILES_TOGETHER)
  within = program % (_TILES_TOGETHER * blocks)
  tile = together * _TILES_TOGETHER + within % left
  columns = pl.ds(within // left * _COLUMNS, _COLUMNS)
  group, start, low, high = (tiles_ref[index, tile] for index in range(4))
  rows = pl.ds(start, _ROWS)
  zeros = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)

  def store(total: jax.Array) -> None:
    row = start + jax.lax.broadcasted_iota(jnp.int32, (_ROWS, _COLUMNS), 0)
    plgpu.store(out_ref.at[rows, columns], total.astype(out_ref.dtype), mask=(row >= low) & (row < high))

  @pl.when((low < high) & (group == groups))
  def _() -> None:
    store(zeros)

  @pl.when((low < high) & (group < groups))
  def _() -> None:
    def step(index: jax.Array, total: jax.Array) -> jax.Array:
      here = pl.ds(index * _INNER, _INNER)
      x = x_ref[rows, here]
      weights = weights_ref[group, columns, here].T if transposed else weights_ref[group, here, columns]
      return total + plgpu.dot(x, weights)

    store(jax.lax.fori_loop(0, inner // _INNER, step, zeros))


def _of_weights_kernel(
  begin_ref: jax.Ref, end_ref: jax.Ref, x_ref: jax.Ref, d_out_ref: jax.Ref, out_ref: jax.Ref
) -> None:
  group = pl.program_id(2)
  begin, end = begin_ref[group], end_ref[group]

  def step(index: jax.Array, total: jax.Array) -> jax.Array:
    rows = pl.ds(index * _INNER, _INNER)
    row = index * _INNER + jax.lax.broadcasted_iota(jnp.int32, (_INNER, _ROWS), 0)
    x = plgpu.load(x_ref.at[rows, :], mask=(row >= begin) & (row < end), other=0.0)
    return total + plgpu.dot(x.T, d_out_ref[rows, :])

  zeros = jnp.zeros((_ROWS, _COLUMNS), jnp.float32)
  total = jax.lax.fori_loop(begin // _INNER, (end + _INNER - 1) // _INNER, step, zeros)
  out_ref[...] = total.astype(out_ref.dtype)
