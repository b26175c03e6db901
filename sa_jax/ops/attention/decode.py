"""Attention of new tokens over a cache that holds the tokens before them."""

import jax
import jax.numpy as jnp

from sa_jax.ops.attention import flash_decode
from sa_jax.ops.attention.reference import apply_weights, attention_weights
from sa_jax.ops.attention.spec import AttentionSpec
from sa_jax.ops.kernels import has_gpu_kernels
from sa_jax.ops.quantize import Int8, Stored, as_stored


def write_slot(cache: Stored, new: jax.Array, slots: jax.Array) -> Stored:
  """Writes one token a row, or T, into slots; a slot past the end writes nothing.

  Args:
    cache: ``[B, K, S, H]``.
    new: ``[B, K, H]``, or ``[B, T, K, H]``.
    slots: int32 ``[B]``, or ``[B, T]``, those of a row all different.
  """
  rows = jnp.arange(slots.shape[0]).reshape((-1,) + (1,) * (slots.ndim - 1))

  def write(cache: jax.Array, new: jax.Array) -> jax.Array:
    return cache.at[rows, :, slots].set(new, mode="drop", unique_indices=True)

  return jax.tree.map(write, cache, as_stored(new, cache))


def _read(stored: Stored, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array | None]:
  """The cache as attention takes it, ``[B, S, K, H]``, and what remains to be multiplied in, ``[B, K, S]``.

  A scale can be multiplied into an int8 vector's product instead of into its elements: then the cache that a product
  reads is int8, and no copy of it is made in another dtype.
  """
  if isinstance(stored, Int8):
    return jnp.swapaxes(stored.data, 1, 2).astype(dtype), stored.scale[..., 0]
  return jnp.swapaxes(stored, 1, 2), None


def decode_weights(
  q: jax.Array, keys: Stored, positions: jax.Array, *, spec: AttentionSpec = AttentionSpec()
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
  data, scale = _read(keys, q.dtype)
  return attention_weights(q, data, positions=positions, spec=spec, key_scale=scale)


def decode_apply(weights: jax.Array, values: Stored) -> jax.Array:
  """Weighted sums of cached values: weights ``[B, N, T, S]``, values ``[B, K, S, H]`` → ``[B, T, N, H]``."""
  data, scale = _read(values, weights.dtype)
  if scale is not None:
    scale = jnp.repeat(scale, weights.shape[1] // scale.shape[1], axis=1)  # from key heads to heads
    weights = (weights.astype(scale.dtype) * scale[:, :, None]).astype(weights.dtype)
  return apply_weights(weights, data)


def decode_attend(
  q: jax.Array,
  new_key: jax.Array,
  new_value: jax.Array,
  keys: Stored,
  values: Stored,
  positions: jax.Array,
  *,
  spec: AttentionSpec = AttentionSpec(),
) -> tuple[jax.Array, Stored, Stored]:
  """Attention of one new token a row over the cache that it joins, without handing out the weights.

  On NVIDIA GPUs in half precision it is one kernel that reads no slot past a row's end (on a mesh, only under
  `jax.shard_map`); elsewhere `write_slot`, `decode_weights` and `decode_apply`.

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


def _has_kernel(q: jax.Array, keys: Stored, spec: AttentionSpec) -> bool:
  data = keys.data if isinstance(keys, Int8) else keys
  return (
    has_gpu_kernels(data)
    and q.dtype in (jnp.bfloat16, jnp.float16)
    and data.dtype in (q.dtype, jnp.int8)
    and spec.window is None
    and spec.softcap is None
    and q.shape[-1] in (64, 128)
    and data.shape[2] % flash_decode.BLOCK == 0
  )
