"""Normalisation over the last axis."""

import jax
import jax.numpy as jnp


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


def layer_norm(x: jax.Array, scale: jax.Array, eps: float, bias: jax.Array | None = None) -> jax.Array:
  """``(x - mean(x)) / sqrt(var(x) + eps) * scale + bias``, all in float32 and then cast (Ba et al., arXiv 1607.06450).

  Args:
    x: ``[..., D]``.
    scale: ``[D]``.
    eps: added to the variance.
    bias: ``[D]``, or None.

  Returns:
    ``[..., D]`` in x's dtype.
  """
  x32 = x.astype(jnp.float32)
  y = _normalised(x32 - jnp.mean(x32, axis=-1, keepdims=True), eps) * _over_last(scale.astype(jnp.float32), x)
  return (y if bias is None else y + _over_last(bias.astype(jnp.float32), x)).astype(x.dtype)


def _normalised(x: jax.Array, eps: float) -> jax.Array:
  x32 = x.astype(jnp.float32)
  return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _over_last(scale: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
