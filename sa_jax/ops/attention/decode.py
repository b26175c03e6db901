"""Attention of one new token a row over a cache that holds the tokens before it."""

import jax
import jax.numpy as jnp

from sa_jax.ops.attention import flash_decode
from sa_jax.ops.attention.reference import apply_weights, attention_weights
from sa_jax.ops.attention.spec import AttentionSpec


def write_slot(cache: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
  """Writes one token a row into its slot; a slot past the end writes nothing.

  Args:
    cache: ``[B, K, S, H]``.
    new: ``[B, K, H]``.
    slots: int32 ``[B]``.
  """
  rows = jnp.arange(cache.shape[0])
  return cache.at[rows, :, slots].set(new.astype(cache.dtype), mode="drop", unique_indices=True)


def decode_weights(
  q: jax.Array, keys: jax.Array, positions: jax.Array, *, spec: AttentionSpec = AttentionSpec()
) -> jax.Array:
  """Softmaxed attention weights of one token a row.

  Args:
    q: ``[B, N, H]``.
    keys: ``[B, K, S, H]``, the token's own among them.
    positions: int32 ``[B]``, the slot of each row's token: it sees slots 0 to that one.
    spec: window, soft cap and scale.

  Returns:
    ``[B, N, 1, S]`` in q's dtype.
  """
  return attention_weights(q[:, None], jnp.swapaxes(keys, 1, 2), positions=positions[:, None], spec=spec)


def decode_apply(weights: jax.Array, values: jax.Array) -> jax.Array:
  """Weighted sums of cached values: weights ``[B, N, 1, S]``, values ``[B, K, S, H]`` → ``[B, N, H]``."""
  return apply_weights(weights, jnp.swapaxes(values, 1, 2))[:, 0]


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
  return decode_apply(decode_weights(q, keys, positions, spec=spec), values), keys, values


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
