"""The product of the output head."""

import functools

import jax
import jax.numpy as jnp

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def logits(hidden: jax.Array, weights: jax.Array, axes: str) -> jax.Array:
  """Logits in float32.

  In half precision, the backward pass of float32 logits would use float32 products, at half the rate of the forward
  pass or less. So the gradient is first rounded to the hidden states' dtype, and products accumulate in float32. It has
  no forward mode; in float32 nothing is rounded, and any derivative can be taken.

  Args:
    hidden: ``[..., D]``; products are computed in its dtype.
    weights: ``[V, D]`` or ``[D, V]``.
    axes: which of the two, ``"VD"`` or ``"DV"``.

  Returns:
    float32 ``[..., V]``.
  """
  return _scores(hidden, weights, axes) if hidden.dtype == jnp.float32 else _rounding(hidden, weights, axes)


def _scores(hidden: jax.Array, weights: jax.Array, axes: str) -> jax.Array:
  return _product(f"...D,{axes}->...V", hidden, weights.astype(hidden.dtype))


_rounding = jax.custom_vjp(_scores, nondiff_argnums=(2,))


def _forward(hidden: jax.Array, weights: jax.Array, axes: str) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _scores(hidden, weights, axes), (hidden, weights)


def _backward(axes: str, residuals: tuple[jax.Array, jax.Array], d_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
  hidden, weights = residuals
  d_logits = d_logits.astype(hidden.dtype)
  d_hidden = _product(f"...V,{axes}->...D", d_logits, weights.astype(hidden.dtype))
  d_weights = _product(f"...V,...D->{axes}", d_logits, hidden)
  return d_hidden.astype(hidden.dtype), d_weights.astype(weights.dtype)


_rounding.defvjp(_forward, _backward)
