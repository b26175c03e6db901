"""Reference attention: the literal formula, with the weights in memory."""

import dataclasses

import jax
import jax.numpy as jnp

from sa_jax.ops.attention.rows import Rows, heads_grouped
from sa_jax.ops.attention.spec import AttentionSpec

MASKED = -1e30
"""Score of a masked key: finite, so that a query with no visible key does not give NaN."""


Segments = tuple[jax.Array, jax.Array]
"""Document ids of queries and keys, int32 ``[B, T]`` and ``[B, S]``."""


def visible(
  query_positions: jax.Array,
  key_positions: jax.Array,
  lengths: jax.Array | None,
  window: int | None = None,
  segments: Segments | None = None,
  causal: bool = True,
) -> jax.Array:
  """Which keys each query sees: those at or before it, in its window and document, and before its row's end.

  Args:
    query_positions: int32 ``[T]`` or ``[B, T]``.
    key_positions: int32 ``[S]``.
    lengths: int32 ``[B]``, number of tokens per row; None if all rows are full.
    window: size of the sliding window, including the query's own key; None for no window. If not causal, it extends
      this far to each side.
    segments: document ids of packed rows; None if each row is one document.
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
    positions: int32 ``[T]`` or ``[B, T]``, each query's slot among the keys; None for ``rows.positions``.
    key_scale: ``[B, K, S]``, factor of each key, for quantised keys; None for 1.

  Returns:
    ``[B, N, T, S]`` in q's dtype. Over S they sum to one, or less with sinks. With pages ``[P, N, T, S]``, which sum
    to one over all pages of a row.
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
  """Weighted sums of values: the second half of attention, and all that a follower computes.

  Args:
    weights: ``[B, N, T, S]``.
    v: ``[B, S, K, R]``; each KV head serves N / K consecutive query heads.

  Returns:
    ``[B, T, N, R]`` in v's dtype.
  """
  batch, heads, queries, keys = weights.shape
  kv_heads = v.shape[2]
  grouped = weights.reshape(batch, kv_heads, heads // kv_heads, queries, keys)
  out = jnp.einsum("BKGTS,BSKH->BTKGH", grouped, v)
  return out.reshape(batch, queries, heads, v.shape[3])


def segments_at(segments: jax.Array, positions: jax.Array) -> jax.Array:
  """Document ids of queries, int32 ``[B, T]``, from those of keys ``[B, S]`` and positions ``[T]`` or ``[B, T]``."""
  positions = jnp.broadcast_to(positions, (segments.shape[0], positions.shape[-1]))
  return jnp.take_along_axis(segments, positions, axis=1, mode="clip")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: Rows, spec: AttentionSpec) -> jax.Array:
  """Attention with materialised weights; O(T S) memory. Shapes as in `sa_jax.ops.attend`."""
  return apply_weights(attention_weights(q, k, rows, spec), v).astype(v.dtype)
