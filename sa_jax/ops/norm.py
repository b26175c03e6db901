"""Root mean square normalisation."""

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


def _normalised(x: jax.Array, eps: float) -> jax.Array:
  x32 = x.astype(jnp.float32)
  return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


def _over_last(scale: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
