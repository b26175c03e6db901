"""Products with few rows, bound by reading the weights, as kernels for NVIDIA GPUs (Pallas, Triton).

Not differentiable: for decoding.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sa_jax.ops.kernels import has_gpu_kernels
from sa_jax.ops.kernels import triton as plgpu

_BLOCK_IN, _BLOCK_OUT = 64, 64
_PARTS = 4  # splits of a sum over an expert's hidden features: more programs if there are few outputs
_MIN_ROWS, _MAX_ROWS = 16, 64


def linears(x: jax.Array, weights: Sequence[jax.Array], *, interpret: bool = False) -> list[jax.Array]:
  """``x w`` for every ``w``, in one kernel.

  XLA would either concatenate the weights into one product, or lose time between products.

  Args:
    x: ``[B, D]``, B up to 64.
    weights: ``[D, F]`` each, F may differ; D and F multiples of 64.
    interpret: runs the kernel on any device, slowly.

  Returns:
    ``[B, F]`` each, in x's dtype.
  """
  whole = lambda shape: pl.BlockSpec(shape, lambda i: (0, 0))
  outputs = [(x.shape[0], weight.shape[1]) for weight in weights]
  return pl.pallas_call(
    functools.partial(_linears_kernel, batch=x.shape[0]),
    grid=(sum(features for _, features in outputs) // _BLOCK_OUT,),
    in_specs=[whole((_padded(x), x.shape[1])), *(whole(weight.shape) for weight in weights)],
    out_specs=[whole((_padded(x), features)) for _, features in outputs],
    out_shape=[jax.ShapeDtypeStruct(shape, x.dtype) for shape in outputs],
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=5),
    interpret=interpret,
    name="linears",
  )(x, *weights)


def gated_linear(x: jax.Array, gate: jax.Array, up: jax.Array, *, interpret: bool = False) -> jax.Array:
  """``silu(x gate) * (x up)`` in one kernel: the gated half of an MLP.

  Args:
    x: ``[B, D]``, B up to 64.
    gate: ``[D, F]``; D and F multiples of 64.
    up: ``[D, F]``.
    interpret: runs the kernel on any device, slowly.

  Returns:
    ``[B, F]`` in x's dtype.
  """
  batch, features = x.shape
  weights = pl.BlockSpec((features, _BLOCK_OUT), lambda i: (0, i))
  return pl.pallas_call(
    functools.partial(_gated_kernel, batch=batch),
    grid=(gate.shape[1] // _BLOCK_OUT,),
    in_specs=[pl.BlockSpec((_padded(x), features), lambda i: (0, 0)), weights, weights],
    out_specs=pl.BlockSpec((_padded(x), _BLOCK_OUT), lambda i: (0, i)),
    out_shape=jax.ShapeDtypeStruct((batch, gate.shape[1]), x.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
    interpret=interpret,
    name="gated_linear",
  )(x, gate, up)


def chosen_gated(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  biases: Sequence[jax.Array],
  places: jax.Array,
  gated: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  interpret: bool = False,
) -> jax.Array:
  """``gated(x gate[e], x up[e])`` for every row and chosen expert ``e``; no other expert's weights are read.

  Args:
    x: ``[B, D]``, B up to 64.
    kernels: gate and up, ``[X, D, F]`` each; D and F multiples of 64.
    biases: of both, ``[X, F]`` each, or empty.
    places: int32 ``[P]``, the chosen experts; negative ones give zeros.
    gated: such as ``lambda gate, up: silu(gate) * up``, elementwise on float32.
    interpret: runs the kernel on any device, slowly.

  Returns:
    ``[P, B, F]`` in x's dtype.
  """
  (batch, features), (experts, _, outputs) = x.shape, kernels[0].shape
  return pl.pallas_call(
    functools.partial(_chosen_gated_kernel, batch=batch, gated=gated),
    grid=(places.shape[0], outputs // _BLOCK_OUT),
    in_specs=[
      pl.BlockSpec(places.shape, lambda p, i: (0,)),
      pl.BlockSpec((_padded(x), features), lambda p, i: (0, 0)),
      *(pl.BlockSpec((experts, features, _BLOCK_OUT), lambda p, i: (0, 0, i)) for _ in kernels),
      *(pl.BlockSpec((experts, _BLOCK_OUT), lambda p, i: (0, i)) for _ in biases),
    ],
    out_specs=pl.BlockSpec((None, _padded(x), _BLOCK_OUT), lambda p, i: (p, 0, i)),
    out_shape=jax.ShapeDtypeStruct((places.shape[0], batch, outputs), x.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
    interpret=interpret,
    name="chosen_gated",
  )(places, x, *kernels, *biases)


def chosen_down(hidden: jax.Array, down: jax.Array, places: jax.Array, *, interpret: bool = False) -> jax.Array:
  """``hidden[p] down[places[p]]``: the other half of the chosen experts.

  Args:
    hidden: ``[P, B, F]``, B up to 64.
    down: ``[X, F, D]``; F and D multiples of 64.
    places: int32 ``[P]``; negative ones give zeros.
    interpret: runs the kernel on any device, slowly.

  Returns:
    float32 ``[P, B, D]``.
  """
  (number, batch, features), outputs = hidden.shape, down.shape[2]
  parts = _PARTS if features % (_PARTS * _BLOCK_IN) == 0 else 1
  rows, part = _padded(hidden[0]), features // parts
  sums = pl.pallas_call(
    functools.partial(_chosen_down_kernel, batch=batch),
    grid=(number, outputs // _BLOCK_OUT, parts),
    in_specs=[
      pl.BlockSpec(places.shape, lambda p, i, s: (0,)),
      pl.BlockSpec((None, rows, part), lambda p, i, s: (p, 0, s)),
      pl.BlockSpec((down.shape[0], part, _BLOCK_OUT), lambda p, i, s: (0, s, i)),
    ],
    out_specs=pl.BlockSpec((None, None, rows, _BLOCK_OUT), lambda p, i, s: (p, s, 0, i)),
    out_shape=jax.ShapeDtypeStruct((number, parts, batch, outputs), jnp.float32),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
    interpret=interpret,
    name="chosen_down",
  )(places, hidden, down)
  return sums.sum(axis=1)


def has_chosen_kernels(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> bool:
  """Whether `chosen_gated` and `chosen_down` can compute x ``[B, D]`` on the present device."""
  sizes = (*gate.shape[1:], down.shape[2])
  return (
    x.dtype in (jnp.bfloat16, jnp.float16)
    and x.shape[0] <= _MAX_ROWS
    and all(size % _BLOCK_IN == 0 and size % _BLOCK_OUT == 0 for size in sizes)
    and all(has_gpu_kernels(w) and w.dtype == x.dtype for w in (gate, up, down))
  )


def has_linear_kernels(x: jax.Array, *weights: jax.Array) -> bool:
  """Whether `linears` and `gated_linear` can compute x ``[B, D]`` times weights ``[D, F]`` on the present device."""
  return (
    x.dtype in (jnp.bfloat16, jnp.float16)
    and x.shape[0] <= _MAX_ROWS
    and x.shape[1] % _BLOCK_IN == 0
    and all(has_gpu_kernels(w) and w.dtype == x.dtype and w.shape[1] % _BLOCK_OUT == 0 for w in weights)
  )


def _padded(x: jax.Array) -> int:
  """Padded rows of a product: tensor cores need at least 16, and a power of two."""
  return max(_MIN_ROWS, pl.next_power_of_2(x.shape[0]))


def _real(rows: int, columns: int, batch: int) -> jax.Array:
  """Which elements of a block belong to the batch, not to its padding."""
  return jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0) < batch


def _products(
  x_ref: jax.Ref, weights: Sequence[jax.Ref], columns: Any, batch: int, of: tuple[jax.Array, ...] = ()
) -> tuple[jax.Array, ...]:
  """Some columns of ``x w``, in float32; ``of`` are leading indices of the weights."""
  rows, features = x_ref.shape

  def block(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    here = pl.ds(index * _BLOCK_IN, _BLOCK_IN)
    x = plgpu.load(x_ref.at[:, here], mask=_real(rows, _BLOCK_IN, batch), other=0.0)
    return tuple(
      total + plgpu.dot(x, weight[(*of, here, columns)]) for total, weight in zip(sums, weights, strict=True)
    )

  zeros = jnp.zeros((rows, _BLOCK_OUT), jnp.float32)
  return jax.lax.fori_loop(0, features // _BLOCK_IN, block, (zeros,) * len(weights))


def _linears_kernel(x_ref: jax.Ref, *refs: jax.Ref, batch: int) -> None:
  weights, outputs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
  program, first = pl.program_id(0), 0
  for weight, output in zip(weights, outputs, strict=True):
    blocks = weight.shape[1] // _BLOCK_OUT

    @pl.when((program >= first) & (program < first + blocks))
    def _(weight: jax.Ref = weight, output: jax.Ref = output, first: int = first) -> None:
      columns = pl.ds((program - first) * _BLOCK_OUT, _BLOCK_OUT)
      (product,) = _products(x_ref, (weight,), columns, batch)
      plgpu.store(output.at[:, columns], product.astype(output.dtype), mask=_real(product.shape[0], _BLOCK_OUT, batch))

    first += blocks


def _gated_kernel(x_ref: jax.Ref, gate_ref: jax.Ref, up_ref: jax.Ref, out_ref: jax.Ref, *, batch: int) -> None:
  gate, up = _products(x_ref, (gate_ref, up_ref), slice(None), batch)
  plgpu.store(out_ref, (jax.nn.silu(gate) * up).astype(out_ref.dtype), mask=_real(gate.shape[0], _BLOCK_OUT, batch))


def _chosen_gated_kernel(
  places_ref: jax.Ref,
  x_ref: jax.Ref,
  *refs: jax.Ref,
  batch: int,
  gated: Callable[[jax.Array, jax.Array], jax.Array],
) -> None:
  gate_ref, up_ref, *biases, out_ref = refs
  expert = places_ref[pl.program_id(0)]
  real = _real(out_ref.shape[0], _BLOCK_OUT, batch)

  @pl.when(expert >= 0)
  def _() -> None:
    gate, up = _products(x_ref, (gate_ref, up_ref), slice(None), batch, (expert,))
    if biases:
      gate, up = (y + bias[expert, :].astype(y.dtype)[None] for y, bias in zip((gate, up), biases, strict=True))
    plgpu.store(out_ref, gated(gate, up).astype(out_ref.dtype), mask=real)

  @pl.when(expert < 0)
  def _() -> None:
    plgpu.store(out_ref, jnp.zeros(out_ref.shape, out_ref.dtype), mask=real)


def _chosen_down_kernel(
  places_ref: jax.Ref, hidden_ref: jax.Ref, down_ref: jax.Ref, out_ref: jax.Ref, *, batch: int
) -> None:
  expert = places_ref[pl.program_id(0)]
  real = _real(out_ref.shape[0], _BLOCK_OUT, batch)

  @pl.when(expert >= 0)
  def _() -> None:
    (product,) = _products(hidden_ref, (down_ref,), slice(None), batch, (expert,))
    plgpu.store(out_ref, product, mask=real)

  @pl.when(expert < 0)
  def _() -> None:
    plgpu.store(out_ref, jnp.zeros(out_ref.shape, out_ref.dtype), mask=real)
