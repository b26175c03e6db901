"""The product that ends a model."""

import functools

import jax
import jax.numpy as jnp

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def logits(hidden: jax.Array, weights: jax.Array, axes: str) -> jax.Array:
  """Each token's score, in float32.

  In half precision, the gradient of float32 logits would be a product in float32, at half the rate of the forward pass
  or less: it is rounded to the hidden states' dtype first, and products accumulate in float32. That gradient has no
  forward mode; in float32 there is nothing to round, and any derivative can be taken.

  Args:
    hidden: ``[..., D]``; its dtype is what products are computed in.
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
