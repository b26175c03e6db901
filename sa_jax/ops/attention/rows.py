"""`Rows`: which keys each query of a batch may see."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sa_jax.ops.attention.pages import Pages

SEGMENTS, BIAS, MASK = "segments", "a score bias", "a mask"
OFFSET, OFFSETS = "a query offset", "per-row query offsets"
NOT_CAUSAL, SINKS = "non-causal attention", "attention sinks"
DEMANDS = (SEGMENTS, BIAS, MASK, OFFSET, OFFSETS, NOT_CAUSAL, SINKS)
"""What rows may require of a backend besides causal attention over whole right-padded rows (`Backend.serves`)."""
PAGES = "a paged cache"
"""No backend supports it; `decode_attend` does."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Which keys each query may see: lengths, documents, offset, bias, mask. Passed from the model to the backend.

  The query at slot ``t`` sees the keys at slots 0 to ``t`` that are before its row's end, in its document, in its
  layer's window (`AttentionSpec`) and not masked. `Rows()` is a batch of full rows.

  Attributes:
    lengths: int32 ``[B]``, number of tokens per right-padded row; None if all rows are full.
    segments: int32 ``[B, S]``, document id of each slot in packed rows, where documents are contiguous; None if each
      row is one document.
    offset: int32 ``[]``, or ``[B]`` if rows differ: the first query's slot among the keys, when the queries are only
      part of a row; None for 0.
    bias: floating-point ``[B or 1, N or 1, T, S]``, added to the scaled and capped scores (such as ALiBi), or None.
    mask: bool ``[B or 1, N or 1, T, S]``, False where a query may not see a key, or None.
    sinks: floating-point ``[N]``, per head the score of an additional key that all queries see and whose value is
      zero (Xiao et al., arXiv 2309.17453, section 3.2; gpt-oss), or None. Followers inherit the anchor's sinks with
      its weights.
    causal: whether keys after a query's own slot are hidden from it. If False, T and S may differ, as in
      cross-attention, and a window extends to both sides.
    pages: page tables, if keys and values are in a paged cache, whose first axis is P instead of B; None for a
      contiguous cache.
  """

  lengths: jax.Array | None = None
  segments: jax.Array | None = None
  offset: jax.Array | None = None
  bias: jax.Array | None = None
  mask: jax.Array | None = None
  sinks: jax.Array | None = None
  causal: bool = dataclasses.field(default=True, metadata={"static": True})
  pages: Pages | None = None

  def positions(self, queries: int) -> jax.Array:
    """The slots of T queries among the keys: int32 ``[T]``, or ``[B, T]`` if rows differ."""
    slots = jnp.arange(queries)
    if self.offset is None:
      return slots
    return jnp.expand_dims(self.offset, -1) + (slots if self.offset.ndim == 0 else slots[None])

  @property
  def demands(self) -> tuple[str, ...]:
    """What these rows require besides causal attention over whole right-padded rows: some of `DEMANDS` and `PAGES`."""
    asked = {
      SEGMENTS: self.segments is not None,
      OFFSET: self.offset is not None and self.offset.ndim == 0,
      OFFSETS: self.offset is not None and self.offset.ndim == 1,
      BIAS: self.bias is not None,
      MASK: self.mask is not None,
      NOT_CAUSAL: not self.causal,
      SINKS: self.sinks is not None,
      PAGES: self.pages is not None,
    }
    return tuple(name for name, here in asked.items() if here)

  def faults(self, batch: int, heads: int, queries: int, keys: int) -> list[str]:
    """Arrays that do not have the shape or dtype for attention of these sizes, one message each."""
    square = f"of shape [B or 1, N or 1, T, S] for {(batch, heads, queries, keys)}"
    squares = [(rows, each, queries, keys) for rows in (1, batch) for each in (1, heads)]
    return [
      f"{wanted}, not {described(array)}"
      for array, kind, shapes, wanted in (
        (self.lengths, jnp.integer, [(batch,)], f"lengths must be integers of shape {(batch,)}"),
        (self.segments, jnp.integer, [(batch, keys)], f"segments must be integers of shape {(batch, keys)}"),
        (self.offset, jnp.integer, [(), (batch,)], f"offset must be an integer, or integers of shape {(batch,)}"),
        (self.bias, jnp.floating, squares, f"bias must be floating-point {square}"),
        (self.mask, jnp.bool_, squares, f"mask must be bool {square}"),
        (self.sinks, jnp.floating, [(heads,)], f"sinks must be floating-point of shape {(heads,)}"),
      )
      if array is not None and not (is_array(array, kind) and array.shape in shapes)
    ]


def is_array(value: object, kind: DTypeLike = jnp.generic) -> bool:
  """Whether a value has a shape, and a dtype of this kind."""
  return hasattr(value, "shape") and hasattr(value, "dtype") and jnp.issubdtype(value.dtype, kind)


def described(value: object) -> str:
  """A value's dtype and shape, for error messages."""
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"{value.dtype} of shape {value.shape}"
  return f"a Python {type(value).__name__} (convert it with np.asarray)"


def heads_grouped(x: jax.Array, kv_heads: int) -> jax.Array:
  """Groups the heads of a bias or mask by KV head: ``[B or 1, N or 1, T, S]`` → ``[B or 1, K or 1, G or 1, T, S]``."""
  batch, heads, queries, keys = x.shape
  grouped = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
  return x.reshape(batch, *grouped, queries, keys)
