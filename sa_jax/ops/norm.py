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
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return normed.astype(x.dtype) * jnp.expand_dims(scale.astype(x.dtype), tuple(range(x.ndim - 1)))
