"""Attention of new tokens over a cache that holds the tokens before them."""

import functools
import importlib
from typing import Literal

import jax
import jax.numpy as jnp

from sa_jax.ops.attention import flash_decode
from sa_jax.ops.attention.pages import Pages
from sa_jax.ops.attention.reference import apply_weights, attention_weights
from sa_jax.ops.attention.rows import OFFSETS, PAGES, SINKS, Rows
from sa_jax.ops.attention.spec import AttentionSpec
from sa_jax.ops.kernels import has_gpu_kernels, is_hopper, is_whole
from sa_jax.ops.quantize import Quantised, Stored, as_stored, product_dtype

Kernels = Literal["flash_decode", "hopper_decode"]
"""Implementations of the decode kernels, by the module: in Pallas Triton, and in Pallas Mosaic GPU for Hopper alone."""
PREFERRED: Kernels = "flash_decode"
"""Which runs where both could."""


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

  A scale can be multiplied into a quantised vector's product instead of into its elements: then the cache that a
  product reads is of whole numbers, and no copy of it is made in another dtype.
  """
  if isinstance(stored, Quantised):
    return jnp.swapaxes(stored.numbers(), 1, 2).astype(dtype), stored.scale[..., 0].astype(jnp.float32)
  return jnp.swapaxes(stored, 1, 2), None


def decode_weights(q: jax.Array, keys: Stored, rows: Rows, spec: AttentionSpec = AttentionSpec()) -> jax.Array:
  """Softmaxed attention weights of new tokens.

  Args:
    q: ``[B, T, N, H]``.
    keys: ``[B, K, S, H]``, the tokens' own among them; with pages ``[P, K, S, H]``.
    rows: whose offset, int32 ``[B]``, is the slot of each row's first new token; and the pages, if there are any.
    spec: window, soft cap and scale.

  Returns:
    ``[B, N, T, S]`` in q's dtype; with pages ``[P, N, T, S]``.
  """
  data, scale = _read(keys, q.dtype)
  return attention_weights(q, data, rows, spec, key_scale=scale)


def decode_apply(weights: jax.Array, values: Stored) -> jax.Array:
  """Weighted sums of cached values: weights ``[B, N, T, S]``, values ``[B, K, S, R]`` → ``[B, T, N, R]``."""
  dtype = product_dtype(values, weights.dtype)
  data, scale = _read(values, dtype)
  scaled = weights
  if scale is not None:
    scale = jnp.repeat(scale, weights.shape[1] // scale.shape[1], axis=1)  # from key heads to heads
    scaled = (weights.astype(scale.dtype) * scale[:, :, None]).astype(dtype)
  return apply_weights(scaled, data).astype(weights.dtype)


def decode_attend(
  q: jax.Array,
  new: tuple[jax.Array, jax.Array],
  cached: tuple[Stored, Stored],
  rows: Rows,
  spec: AttentionSpec = AttentionSpec(),
  with_weights: bool = False,
) -> tuple[jax.Array, jax.Array | None, tuple[Stored, Stored]]:
  """Attention of new tokens over the cache that they join.

  On NVIDIA GPUs in half precision, one token a row is one kernel that reads no block of 64 slots past the row's end (on
  a mesh, only under `jax.shard_map`); elsewhere `write_slot`, `decode_weights` and `decode_apply`.

  Args:
    q: ``[B, T, N, H]``.
    new: keys ``[B, T, K, H]`` and values ``[B, T, K, R]`` of the tokens.
    cached: keys ``[B, K, S, H]`` and values ``[B, K, S, R]``; with pages, P of them instead of B.
    rows: whose offset, int32 ``[B]``, is the slot that each row's first new token takes; and its pages, if it has any.
    spec: window, soft cap and scale.
    with_weights: whether followers need the weights; without, a kernel may keep them.

  Returns:
    ``[B, T, N, R]``; the softmaxed weights ``[B, N, T, S]``, with pages ``[P, N, T, S]``, or None; cached keys and
    values with the new ones.
  """
  assert rows.offset is not None, "new tokens have a slot in the cache"
  plain = spec.window is None and spec.softcap is None and not set(rows.demands) - {OFFSETS, SINKS, PAGES}
  name = which_kernels(q.shape[1], q.dtype, *cached)
  if name is not None and plain:
    kernels = importlib.import_module(f"sa_jax.ops.attention.{name}")
    how = flash_decode.How(spec.scale_for(q.shape[-1]), with_weights)
    out, weights, cached = kernels.attend(q[:, 0], (new[0][:, 0], new[1][:, 0]), cached, rows, how)
    return out[:, None], None if weights is None else weights[:, :, None], cached
  keys, values = (_with_new(stored, x, rows.offset, rows.pages) for stored, x in zip(cached, new, strict=True))
  weights = decode_weights(q, keys, rows, spec)
  return _apply(weights, values, rows.pages), weights if with_weights else None, (keys, values)


def _with_new(cache: Stored, new: jax.Array, offset: jax.Array, pages: Pages | None) -> Stored:
  """The cache with new tokens' vectors ``[B, T, K, H]`` from each row's offset on."""
  if pages is None:
    return write_slot(cache, new, Rows(offset=offset).positions(new.shape[1]))
  slots, size = Rows(offset=pages.offsets(offset)).positions(new.shape[1]), jax.tree.leaves(cache)[0].shape[2]
  # Slots before a page are not in it, and counted from its end they would be.
  return write_slot(cache, pages.of_rows(new), jnp.where(slots < 0, size - slots, slots))


def _apply(weights: jax.Array, values: Stored, pages: Pages | None) -> jax.Array:
  """`decode_apply`, and the sum over each row's pages."""
  out = decode_apply(weights, values)
  return out if pages is None else pages.summed(out.astype(jnp.float32)).astype(out.dtype)


def decode_follow(
  weights: jax.Array, new_values: jax.Array, values: Stored, offset: jax.Array, pages: Pages | None = None
) -> tuple[jax.Array, Stored]:
  """A follower's attention of new tokens over the values that theirs join; a kernel where `decode_attend` is one.

  Args:
    weights: ``[B, N, T, S]``, the anchor's; with pages ``[P, N, T, S]``.
    new_values: ``[B, T, K, R]``.
    values: ``[B, K, S, R]``; with pages ``[P, K, S, R]``.
    offset: int32 ``[B]``, the slot that each row's first new token takes.
    pages: where the rows lie in a cache of pages.

  Returns:
    ``[B, T, N, R]``, and the values with the new ones.
  """
  name = which_kernels(weights.shape[2], weights.dtype, values)
  if name is not None:
    kernels = importlib.import_module(f"sa_jax.ops.attention.{name}")
    out, values = kernels.follow(weights[:, :, 0], new_values[:, 0], values, offset, pages)
    return out[:, None], values
  values = _with_new(values, new_values, offset, pages)
  return _apply(weights, values, pages), values


def which_kernels(tokens: int, dtype: jax.typing.DTypeLike, *cached: Stored) -> Kernels | None:
  """Which implementation takes so many new tokens a row, queries or weights of this dtype, and these caches, if any."""
  takes: dict[Kernels, bool] = {
    "flash_decode": all(map(functools.partial(_has_kernel, tokens, dtype), cached)),
    "hopper_decode": all(map(functools.partial(_has_hopper_kernel, tokens, dtype), cached)),
  }
  return PREFERRED if takes[PREFERRED] else next((name for name in takes if takes[name]), None)


def _has_hopper_kernel(tokens: int, dtype: jax.typing.DTypeLike, stored: Stored) -> bool:
  """Whether Hopper's kernels take so many new tokens a row, queries or weights of this dtype, and this cache."""
  data = stored.data if isinstance(stored, Quantised) else stored
  if isinstance(stored, Quantised):
    takes = stored.format.bits == 8 and stored.width == 128
  else:
    takes = stored.dtype == dtype and stored.shape[3] in (64, 128)
  return (
    takes
    and is_hopper()
    and is_whole(data)
    and tokens == 1
    and dtype in (jnp.bfloat16, jnp.float16)
    and data.shape[2] % flash_decode.BLOCK == 0
  )


def _has_kernel(tokens: int, dtype: jax.typing.DTypeLike, stored: Stored) -> bool:
  """Whether kernels take so many new tokens a row, queries or weights of this dtype, and this cache."""
  data, width = (stored.data, stored.width) if isinstance(stored, Quantised) else (stored, stored.shape[3])
  return (
    has_gpu_kernels(data)
    and tokens == 1
    and dtype in (jnp.bfloat16, jnp.float16)
    and (isinstance(stored, Quantised) or stored.dtype == dtype)
    and width in (32, 64, 128)
    and data.shape[2] % flash_decode.BLOCK == 0
  )
