"""The gated half of an MLP."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sa_jax.ops.kernels import has_gpu_kernels

_BLOCK_IN, _BLOCK_OUT = 64, 64
_MIN_ROWS, _MAX_ROWS = 16, 64


def gated_linear(x: jax.Array, gate: jax.Array, up: jax.Array, *, interpret: bool = False) -> jax.Array:
  """``silu(x gate) * (x up)`` in one kernel for NVIDIA GPUs, for so few rows that reading the weights is the cost.

  Not differentiable: for decoding.

  Args:
    x: ``[B, D]``, B up to 64.
    gate: ``[D, F]``; D and F multiples of 64.
    up: ``[D, F]``.
    interpret: runs the kernel on any device, slowly.

  Returns:
    ``[B, F]`` in x's dtype.
  """
  batch, features = x.shape
  rows = max(_MIN_ROWS, pl.next_power_of_2(batch))
  weights = pl.BlockSpec((features, _BLOCK_OUT), lambda i: (0, i))
  return pl.pallas_call(
    functools.partial(_kernel, batch=batch),
    grid=(gate.shape[1] // _BLOCK_OUT,),
    in_specs=[pl.BlockSpec((rows, features), lambda i: (0, 0)), weights, weights],
    out_specs=pl.BlockSpec((rows, _BLOCK_OUT), lambda i: (0, i)),
    out_shape=jax.ShapeDtypeStruct((batch, gate.shape[1]), x.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="gated_linear",
  )(x, gate, up)


def has_gated_linear(x: jax.Array, gate: jax.Array) -> bool:
  """Whether `gated_linear` can compute the call, x ``[B, D]`` and gate ``[D, F]``, on the present device."""
  return (
    has_gpu_kernels(gate)
    and x.dtype in (jnp.bfloat16, jnp.float16)
    and x.dtype == gate.dtype
    and x.shape[0] <= _MAX_ROWS
    and x.shape[1] % _BLOCK_IN == 0
    and gate.shape[1] % _BLOCK_OUT == 0
  )


def _kernel(x_ref: Any, gate_ref: Any, up_ref: Any, out_ref: Any, *, batch: int) -> None:
  rows = x_ref.shape[0]
  real = lambda columns: jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0) < batch

  def block(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    gate, up = carry
    here = pl.ds(index * _BLOCK_IN, _BLOCK_IN)
    x = plgpu.load(x_ref.at[:, here], mask=real(_BLOCK_IN), other=0.0)
    return gate + plgpu.dot(x, gate_ref[here, :]), up + plgpu.dot(x, up_ref[here, :])

  zeros = jnp.zeros(out_ref.shape, jnp.float32)
  gate, up = jax.lax.fori_loop(0, x_ref.shape[1] // _BLOCK_IN, block, (zeros, zeros))
  plgpu.store(out_ref, (jax.nn.silu(gate) * up).astype(out_ref.dtype), mask=real(_BLOCK_OUT))
