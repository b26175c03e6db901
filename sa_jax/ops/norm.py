"""Root mean square normalisation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """``x / sqrt(mean(x²) + eps) * scale`` over the last axis (Zhang & Sennrich, arXiv 1910.07467).

  The statistics are computed in float32 and the quotient is cast to x's dtype before scaling, as in Llama.

  Args:
    x: ``[..., D]``.
    scale: ``[D]``.
    eps: added to the mean square.

  Returns:
    ``[..., D]`` in x's dtype.
  """
  return _normalised(x, eps).astype(x.dtype) * _over_last(scale.astype(x.dtype), x)


def rms_norm_about_one(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """``x / sqrt(mean(x²) + eps) * (1 + scale)``, all in float32 and then cast, as in Gemma.

  Arguments and result as in `rms_norm`.
  """
  return (_normalised(x, eps) * _over_last(1.0 + scale.astype(jnp.float32), x)).astype(x.dtype)


def add_rms_norm(
  x: jax.Array, y: jax.Array, scale: jax.Array, eps: float, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
  """``x + y`` and its `rms_norm`, in one kernel for NVIDIA GPUs: for decoding, where small kernels cost their launch.

  Args:
    x: ``[B, D]``.
    y: ``[B, D]``.
    scale: ``[D]``.
    eps: added to the mean square.
    interpret: runs the kernel on any device, slowly.

  Returns:
    Both ``[B, D]`` in x's dtype.
  """
  columns = pl.next_power_of_2(x.shape[1])
  row = pl.BlockSpec((None, columns), lambda b: (b, 0))
  return pl.pallas_call(
    functools.partial(_add_rms_norm_kernel, features=x.shape[1], eps=eps),
    grid=(x.shape[0],),
    in_specs=[row, row, pl.BlockSpec((columns,), lambda b: (0,))],
    out_specs=[row, row],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
    compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
    interpret=interpret,
    name="add_rms_norm",
  )(x, y, scale)


def _add_rms_norm_kernel(
  x_ref: Any, y_ref: Any, scale_ref: Any, sum_ref: Any, out_ref: Any, *, features: int, eps: float
) -> None:
  real = jax.lax.broadcasted_iota(jnp.int32, x_ref.shape, 0) < features
  x, y, scale = (plgpu.load(ref, mask=real, other=0.0) for ref in (x_ref, y_ref, scale_ref))
  added = x + y
  added32 = added.astype(jnp.float32)
  normalised = added32 * jax.lax.rsqrt(jnp.sum(jnp.square(added32)) / features + eps)
  plgpu.store(sum_ref, added, mask=real)
  plgpu.store(out_ref, normalised.astype(x.dtype) * scale.astype(x.dtype), mask=real)


def _normalised(x: jax.Array, eps: float) -> jax.Array:
  x32 = x.astype(jnp.float32)
  return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _over_last(scale: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
