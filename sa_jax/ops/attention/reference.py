"""Attention as the formula says it, with the weights in memory."""

import dataclasses

import jax
import jax.numpy as jnp

from sa_jax.ops.attention.rows import Rows, heads_grouped
from sa_jax.ops.attention.spec import AttentionSpec

MASKED = -1e30
"""Score of a key that a query may not see: finite, so that a row with no visible key stays finite."""


Segments = tuple[jax.Array, jax.Array]
"""The documents that queries and keys belong to, int32 ``[B, T]`` and ``[B, S]``."""


def visible(
  query_positions: jax.Array,
  key_positions: jax.Array,
  lengths: jax.Array | None,
  window: int | None = None,
  segments: Segments | None = None,
  causal: bool = True,
) -> jax.Array:
  """Which keys each query sees: those at or before it, within its window and document, and before a padded row's end.

  Args:
    query_positions: int32 ``[T]`` or ``[B, T]``.
    key_positions: int32 ``[S]``.
    lengths: int32 ``[B]``, tokens of each row, or None when rows are full.
    window: how many keys a query sees at most, its own included; None for all. To each side if not causal.
    segments: the documents of packed rows; None when a row is one document.
    causal: whether keys after a query are hidden from it.

  Returns:
    bool ``[B or 1, T, S]``.
  """
  query = jnp.atleast_2d(query_positions)[:, :, None]
  key = key_positions[None, None, :]
  seen = key <= query if causal else jnp.ones_like(key <= query)
  if window is not None:
    seen &= (key > query - window) if causal else jnp.abs(key - query) < window
  if segments is not None:
    seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])
  return seen if lengths is None else seen & (key < lengths[:, None, None])


def attention_weights(
  q: jax.Array,
  k: jax.Array,
  rows: Rows = Rows(),
  spec: AttentionSpec = AttentionSpec(),
  *,
  positions: jax.Array | None = None,
  key_scale: jax.Array | None = None,
) -> jax.Array:
  """Softmaxed attention weights, computed in float32 and cast to q's dtype.

  Query head ``n`` attends to key head ``n // (N / K)``.

  Args:
    q: ``[B, T, N, H]``.
    k: ``[B, S, K, H]``; with pages ``[P, S, K, H]``.
    rows: which keys the queries may see.
    spec: window, soft cap and scale.
    positions: int32 ``[T]`` or ``[B, T]``, the slot of each query among the keys; when None, that of the rows.
    key_scale: ``[B, K, S]``, what each key is to be multiplied by; None when keys are as they are.

  Returns:
    ``[B, N, T, S]`` in q's dtype; rows sum to one, or with sinks to less. With pages ``[P, N, T, S]``: those of a row's
    pages together do.
  """
  pages = rows.pages
  if pages is not None:
    assert rows.offset is not None, "a query of pages has a slot"
    q, rows = pages.of_rows(q), dataclasses.replace(rows, offset=pages.offsets(rows.offset))
  batch, queries, heads, head_dim = q.shape
  keys, kv_heads = k.shape[1], k.shape[2]
  grouped = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
  products = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
  if key_scale is not None:
    products *= key_scale[:, :, None, None, :]
  scores = spec.scores(products, head_dim)
  if rows.bias is not None:
    scores += heads_grouped(rows.bias, kv_heads).astype(scores.dtype)
  if positions is None:
    positions = rows.positions(queries)
  pair = None if rows.segments is None else (segments_at(rows.segments, positions), rows.segments)
  seen = visible(positions, jnp.arange(keys), rows.lengths, spec.window, pair, rows.causal)[:, None, None]
  if rows.mask is not None:
    seen = seen & heads_grouped(rows.mask, kv_heads)
  scores = jnp.where(seen, scores, MASKED)
  if rows.sinks is None and pages is None:
    weights = jax.nn.softmax(scores, axis=-1)
  else:
    log_sums = jax.nn.logsumexp(scores, axis=-1)
    if pages is not None:
      log_sums = pages.log_totals(log_sums)
    if rows.sinks is not None:
      log_sums = jnp.logaddexp(log_sums, rows.sinks.astype(scores.dtype).reshape(1, kv_heads, -1, 1))
    if pages is not None:
      log_sums = pages.of_rows(log_sums)
    weights = jnp.exp(scores - log_sums[..., None])
  return weights.astype(q.dtype).reshape(batch, heads, queries, keys)


def apply_weights(weights: jax.Array, v: jax.Array) -> jax.Array:
  """Weighted sums of values: the second half of attention, and all of it in a follower layer.

  Args:
    weights: ``[B, N, T, S]``.
    v: ``[B, S, K, R]``; each value head serves N / K consecutive weight heads.

  Returns:
    ``[B, T, N, R]`` in v's dtype.
  """
  batch, heads, queries, keys = weights.shape
  kv_heads = v.shape[2]
  grouped = weights.reshape(batch, kv_heads, heads // kv_heads, queries, keys)
  out = jnp.einsum("BKGTS,BSKH->BTKGH", grouped, v)
  return out.reshape(batch, queries, heads, v.shape[3])


def segments_at(segments: jax.Array, positions: jax.Array) -> jax.Array:
  """The documents, int32 ``[B, T]``, of the queries at ``[T]`` or ``[B, T]`` among keys of documents ``[B, S]``."""
  positions = jnp.broadcast_to(positions, (segments.shape[0], positions.shape[-1]))
  return jnp.take_along_axis(segments, positions, axis=1, mode="clip")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec) -> jax.Array:
  """Attention through its weights; O(T S) memory. Shapes as in `sa_jax.ops.attend`."""
  return apply_weights(attention_weights(q, k, rows, spec), v).astype(v.dtype)
