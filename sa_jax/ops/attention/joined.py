"""Combining the partial results of split decode attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sa_jax.ops.attention.reference import MASKED
from sa_jax.ops.attention.rows import Rows


class Partial(NamedTuple):
  """A kernel's results for P parts of each row's slots, each with its own softmax.

  Attributes:
    out: ``[B, K, P, G, R]``, the attention output of each part.
    log_total: float32 ``[B, K, P, G]``, the log-sum-exp of each part.
    scores: float32 ``[B, K, G, S]``, scaled scores, from which weights are computed; or None.
  """

  out: jax.Array
  log_total: jax.Array
  scores: jax.Array | None


def joined(parts: Partial, rows: Rows, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
  """Combines the parts of each row, and of its pages, into the output and the weights (or None)."""
  (out, log_total, scores), positions, pages = parts, rows.offset, rows.pages
  batch, kv_heads, splits, group, width = out.shape
  assert positions is not None, "a new token has a slot in the cache"
  if pages is not None:
    positions = pages.offsets(positions)
  mine = jax.nn.logsumexp(log_total, axis=2)
  if splits > 1:
    # All parts of an empty page have a log-sum of minus infinity.
    shares = jnp.exp(log_total - jnp.maximum(mine, MASKED)[:, :, None])
    out = jnp.einsum("BKSGH,BKSG->BKGH", out, shares)
  log_total = mine
  if pages is not None:
    log_total = pages.log_totals(log_total)
  if rows.sinks is not None:
    # A sink is an additional key whose value is zero.
    log_total = jnp.logaddexp(log_total, rows.sinks.astype(jnp.float32).reshape(1, kv_heads, group))
  if pages is not None:
    log_total = pages.of_rows(log_total)
  if log_total is not mine:
    # Rescale the output to the larger sum.
    out = out.reshape(batch, kv_heads, group, width) * jnp.exp(mine - log_total)[..., None].astype(out.dtype)
  weights = None
  if scores is not None:
    # The kernel does not write slots past a row's end: they hold arbitrary memory.
    seen = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 3) <= positions[:, None, None, None]
    weights = jnp.where(seen, jnp.exp(scores - log_total[..., None]), 0.0)
    weights = weights.astype(dtype).reshape(batch, kv_heads * group, -1)
  out = out.reshape(batch, kv_heads * group, width)
  return (out if pages is None else pages.summed(out)).astype(dtype), weights
