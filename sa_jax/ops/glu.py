"""The gated half of an MLP."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_BLOCK_IN, _BLOCK_OUT = 64, 64
_MIN_ROWS, _MAX_ROWS = 16, 64


def gated_linear(
  x: jax.Array,
  y: jax.Array,
  scale: jax.Array,
  gate: jax.Array,
  up: jax.Array,
  *,
  eps: float,
  interpret: bool = False,
) -> jax.Array:
  """``silu(h gate) * (h up)`` of ``h = rms_norm(x + y, scale, eps)``, in one kernel for NVIDIA GPUs.

  For so few rows that reading the weights is the cost. Every program adds and normalises the rows for itself, while it
  waits for its weights, which is cheaper than two small kernels before this one; the norm's denominator is a
  factor of the products and is applied to them. Not differentiable: for decoding.

  Args:
    x: ``[B, D]``, B up to 64: the residual stream.
    y: ``[B, D]``: what attention adds to it.
    scale: ``[D]``, the norm's.
    gate: ``[D, F]``; D and F multiples of 64.
    up: ``[D, F]``.
    eps: the norm's.
    interpret: runs the kernel on any device, slowly.

  Returns:
    ``[B, F]`` in x's dtype.
  """
  batch, features = x.shape
  rows = max(_MIN_ROWS, pl.next_power_of_2(batch))
  stream = pl.BlockSpec((rows, features), lambda i: (0, 0))
  weights = pl.BlockSpec((features, _BLOCK_OUT), lambda i: (0, i))
  return pl.pallas_call(
    functools.partial(_kernel, batch=batch, eps=eps),
    grid=(gate.shape[1] // _BLOCK_OUT,),
    in_specs=[stream, stream, pl.BlockSpec((features,), lambda i: (0,)), weights, weights],
    out_specs=pl.BlockSpec((rows, _BLOCK_OUT), lambda i: (0, i)),
    out_shape=jax.ShapeDtypeStruct((batch, gate.shape[1]), x.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="gated_linear",
  )(x, y, scale, gate, up)


def has_gated_linear(x: jax.Array, gate: jax.Array) -> bool:
  """Whether `gated_linear` can compute the call, x ``[B, D]`` and gate ``[D, F]``, on the present device."""
  return (
    jax.default_backend() == "gpu"
    and x.dtype == gate.dtype == jnp.bfloat16  # float16 could overflow before it is normalised
    and x.shape[0] <= _MAX_ROWS
    and x.shape[1] % _BLOCK_IN == 0
    and gate.shape[1] % _BLOCK_OUT == 0
  )


def _kernel(
  x_ref: Any, y_ref: Any, scale_ref: Any, gate_ref: Any, up_ref: Any, out_ref: Any, *, batch: int, eps: float
) -> None:
  rows, features = x_ref.shape
  real = lambda columns: jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0) < batch

  def block(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    gate, up, squares = carry
    here = pl.ds(index * _BLOCK_IN, _BLOCK_IN)
    x, y = (plgpu.load(ref.at[:, here], mask=real(_BLOCK_IN), other=0.0) for ref in (x_ref, y_ref))
    added = (x + y).astype(jnp.float32)
    scaled = (added * scale_ref[here].astype(jnp.float32)[None, :]).astype(x.dtype)
    squares = squares + jnp.square(added).sum(axis=1)
    return gate + plgpu.dot(scaled, gate_ref[here, :]), up + plgpu.dot(scaled, up_ref[here, :]), squares

  zeros = jnp.zeros(out_ref.shape, jnp.float32)
  gate, up, squares = jax.lax.fori_loop(0, features // _BLOCK_IN, block, (zeros, zeros, jnp.zeros(rows, jnp.float32)))
  norm = jax.lax.rsqrt(squares / features + eps)[:, None]
  plgpu.store(out_ref, (jax.nn.silu(gate * norm) * (up * norm)).astype(out_ref.dtype), mask=real(_BLOCK_OUT))
