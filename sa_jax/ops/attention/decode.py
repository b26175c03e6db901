"""Attention of new tokens over a cache that holds the tokens before them."""

import jax
import jax.numpy as jnp

from sa_jax.ops.attention import flash_decode
from sa_jax.ops.attention.reference import apply_weights, attention_weights
from sa_jax.ops.attention.spec import AttentionSpec


def write_slot(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
  """Writes one token a row, or T, into slots; a slot past the end writes nothing.

  Args:
    cache: ``[B, K, S, H]``.
    new: ``[B, K, H]``, or ``[B, T, K, H]``.
    slots: int32 ``[B]``, or ``[B, T]``, those of a row all different.
  """
  rows = jnp.arange(cache.shape[0]).reshape((-1,) + (1,) * (slots.ndim - 1))
  return cache.at[rows, :, slots].set(new.astype(cache.dtype), mode="drop", unique_indices=True)


def decode_weights(
  q: jax.Array, keys: jax.Array, positions: jax.Array, *, spec: AttentionSpec = AttentionSpec()
) -> jax.Array:
  """Softmaxed attention weights of new tokens.

  Args:
    q: ``[B, T, N, H]``.
    keys: ``[B, K, S, H]``, the tokens' own among them.
    positions: int32 ``[B, T]``, the slot of each token: it sees slots 0 to that one.
    spec: window, soft cap and scale.

  Returns:
    ``[B, N, T, S]`` in q's dtype.
  """
  return attention_weights(q, jnp.swapaxes(keys, 1, 2), positions=positions, spec=spec)


def decode_apply(weights: jax.Array, values: jax.Array) -> jax.Array:
  """Weighted sums of cached values: weights ``[B, N, T, S]``, values ``[B, K, S, H]`` → ``[B, T, N, H]``."""
  return apply_weights(weights, jnp.swapaxes(values, 1, 2))


def decode_attend(
  q: jax.Array,
  new_key: jax.Array,
  new_value: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  positions: jax.Array,
  *,
  spec: AttentionSpec = AttentionSpec(),
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Attention of one new token a row over the cache that it joins, without handing out the weights.

  On NVIDIA GPUs in half precision it is one kernel that reads no slot past a row's end; elsewhere `write_slot`,
  `decode_weights` and `decode_apply`.

  Args:
    q: ``[B, N, H]``.
    new_key: ``[B, K, H]``.
    new_value: ``[B, K, H]``.
    keys: ``[B, K, S, H]``.
    values: ``[B, K, S, H]``.
    positions: int32 ``[B]``, the slot that each row's token takes.
    spec: window, soft cap and scale.

  Returns:
    ``[B, N, H]``, and the cache with the new keys and values.
  """
  if _has_kernel(q, keys, spec):
    scale = spec.scale_for(q.shape[-1])
    return flash_decode.attend(q, new_key, new_value, keys, values, positions, scale=scale)
  keys, values = write_slot(keys, new_key, positions), write_slot(values, new_value, positions)
  weights = decode_weights(q[:, None], keys, positions[:, None], spec=spec)
  return decode_apply(weights, values)[:, 0], keys, values


def _has_kernel(q: jax.Array, keys: jax.Array, spec: AttentionSpec) -> bool:
  return (
    jax.default_backend() == "gpu"
    and q.dtype in (jnp.bfloat16, jnp.float16)
    and q.dtype == keys.dtype
    and spec.window is None
    and spec.softcap is None
    and q.shape[-1] in (64, 128)
    and keys.shape[2] % flash_decode.BLOCK == 0
  )
