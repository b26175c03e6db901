"""Decode attention: new tokens over a cache of the tokens before them."""

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
"""Modules with decode kernels: in Pallas Triton, and in Pallas Mosaic GPU for Hopper only."""
PREFERRED: Kernels = "flash_decode"
"""The one to use if both support the call."""
_WIDTHS: dict[Kernels, dict[int, tuple[int, ...]]] = {
  "flash_decode": {16: (32, 64, 128), 8: (32, 64, 128), 4: (32, 64, 128)},
  "hopper_decode": {16: (64, 128), 8: (128,)},
}
"""Sizes of cached vectors that they support, by bits per number."""


def write_slot(cache: Stored, new: jax.Array, slots: jax.Array) -> Stored:
  """Writes one token per row, or T, into cache slots. Slots past the end are ignored.

  Args:
    cache: ``[B, K, S, H]``.
    new: ``[B, K, H]``, or ``[B, T, K, H]``.
    slots: int32 ``[B]``, or ``[B, T]`` without duplicates in a row.

  Returns:
    The updated cache.
  """
  rows = jnp.arange(slots.shape[0]).reshape((-1,) + (1,) * (slots.ndim - 1))

  def write(cache: jax.Array, new: jax.Array) -> jax.Array:
    return cache.at[rows, :, slots].set(new, mode="drop", unique_indices=True)

  return jax.tree.map(write, cache, as_stored(new, cache))


def _read(stored: Stored, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array | None]:
  """The cache in attention's axis order, ``[B, S, K, H]``, and the scales still to be applied, ``[B, K, S]`` or None.

  Scales are applied to the products instead of the vectors, so that products read the integers without a dequantised
  copy of the cache.
  """
  if isinstance(stored, Quantised):
    return jnp.swapaxes(stored.numbers(), 1, 2).astype(dtype), stored.scale[..., 0].astype(jnp.float32)
  return jnp.swapaxes(stored, 1, 2), None


def decode_weights(q: jax.Array, keys: Stored, rows: Rows, spec: AttentionSpec = AttentionSpec()) -> jax.Array:
  """Softmaxed attention weights of new tokens.

  Args:
    q: ``[B, T, N, H]``.
    keys: ``[B, K, S, H]``, including those of the new tokens; with pages ``[P, K, S, H]``.
    rows: ``rows.offset``, int32 ``[B]``, is the slot of each row's first new token; ``rows.pages`` for a paged cache.
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
  """Adds new tokens to the cache and computes their attention over it.

  For one token per row in half precision on NVIDIA GPUs, this is a single kernel that skips blocks of 64 slots past a
  row's end (on a mesh, only under `jax.shard_map`). Otherwise it is `write_slot`, `decode_weights` and `decode_apply`.

  Args:
    q: ``[B, T, N, H]``.
    new: the tokens' keys ``[B, T, K, H]`` and values ``[B, T, K, R]``.
    cached: keys ``[B, K, S, H]`` and values ``[B, K, S, R]``; with pages, P instead of B.
    rows: ``rows.offset``, int32 ``[B]``, is the slot for each row's first new token; ``rows.pages`` for a paged cache.
    spec: window, soft cap and scale.
    with_weights: whether to return the weights, which followers need.

  Returns:
    The output ``[B, T, N, R]``; the softmaxed weights ``[B, N, T, S]`` (with pages ``[P, N, T, S]``) or None; the
    updated keys and values.
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
  """Writes new tokens' vectors ``[B, T, K, H]`` into the cache, starting at each row's offset."""
  if pages is None:
    return write_slot(cache, new, Rows(offset=offset).positions(new.shape[1]))
  slots, size = Rows(offset=pages.offsets(offset)).positions(new.shape[1]), jax.tree.leaves(cache)[0].shape[2]
  # A slot before the page is negative, which would index from its end: move it past the end, where it is ignored.
  return write_slot(cache, pages.of_rows(new), jnp.where(slots < 0, size - slots, slots))


def _apply(weights: jax.Array, values: Stored, pages: Pages | None) -> jax.Array:
  """`decode_apply`, summed over each row's pages."""
  out = decode_apply(weights, values)
  return out if pages is None else pages.summed(out.astype(jnp.float32)).astype(out.dtype)


def decode_follow(
  weights: jax.Array, new_values: jax.Array, values: Stored, offset: jax.Array, pages: Pages | None = None
) -> tuple[jax.Array, Stored]:
  """Adds new tokens' values to the cache and computes a follower's attention; a kernel when `decode_attend` is one.

  Args:
    weights: ``[B, N, T, S]``, the anchor's; with pages ``[P, N, T, S]``.
    new_values: ``[B, T, K, R]``.
    values: ``[B, K, S, R]``; with pages ``[P, K, S, R]``.
    offset: int32 ``[B]``, the slot for each row's first new token.
    pages: page tables of a paged cache, or None.

  Returns:
    The output ``[B, T, N, R]``, and the updated values.
  """
  name = which_kernels(weights.shape[2], weights.dtype, values)
  if name is not None:
    kernels = importlib.import_module(f"sa_jax.ops.attention.{name}")
    out, values = kernels.follow(weights[:, :, 0], new_values[:, 0], values, offset, pages)
    return out[:, None], values
  values = _with_new(values, new_values, offset, pages)
  return _apply(weights, values, pages), values


def which_kernels(tokens: int, dtype: jax.typing.DTypeLike, *cached: Stored) -> Kernels | None:
  """The implementation that supports this many new tokens per row, dtype of q or weights, and caches; None if none."""
  if tokens != 1 or dtype not in (jnp.bfloat16, jnp.float16):
    return None
  able = [name for name in _WIDTHS if all(_supports(name, dtype, stored) for stored in cached)]
  return PREFERRED if PREFERRED in able else next(iter(able), None)


def _supports(kernels: Kernels, dtype: jax.typing.DTypeLike, stored: Stored) -> bool:
  """Whether kernels support this dtype of q or weights, and this cache on its devices."""
  if isinstance(stored, Quantised):
    data, width, bits = stored.data, stored.width, stored.format.bits
  else:
    data, width, bits = stored, stored.shape[3], 16 if stored.dtype == dtype else 0
  here = has_gpu_kernels(data) if kernels == "flash_decode" else is_hopper() and is_whole(data)
  return here and width in _WIDTHS[kernels].get(bits, ()) and data.shape[2] % flash_decode.BLOCK == 0
