"""What the rows of a call are like, and so which keys each of their queries may see."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sa_jax.ops.attention.pages import Pages

SEGMENTS, BIAS, MASK = "segments", "bias of the scores", "mask"
OFFSET, OFFSETS = "offset of the queries among the keys", "offset of the queries for each row by itself"
NOT_CAUSAL, SINKS = "attention that is not causal", "attention sinks"
DEMANDS = (SEGMENTS, BIAS, MASK, OFFSET, OFFSETS, NOT_CAUSAL, SINKS)
"""What rows may ask of a backend besides causal attention over whole right-padded rows (`Backend.serves`)."""
PAGES = "keys in pages"
"""What no backend serves: `decode_attend` does."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """The one value that travels from a model's door to the backend that computes its attention.

  A query of slot ``t`` sees the keys at slots 0 to ``t``, if they are before its row's end, in its document, in its
  layer's window (`AttentionSpec`) and not masked. A value of all defaults is a batch of full rows.

  Attributes:
    lengths: int32 ``[B]``, tokens of right-padded rows; None when rows are full.
    segments: int32 ``[B, S]``, the document of each slot of packed rows, each a stretch of the row; None when a row is
      one document.
    offset: int32 ``[]``, or ``[B]`` where rows differ: the slot of the first query among the keys, where the queries
      are part of a row; None for 0.
    bias: ``[B or 1, N or 1, T, S]``, added to the scaled and capped scores (ALiBi, for example), or None.
    mask: bool ``[B or 1, N or 1, T, S]``, False where a query may not see a key, or None.
    sinks: floating-point ``[N]``, for each head the score of one key more, which all queries see and whose value is
      zero (Xiao et al., arXiv 2309.17453, section 3.2; gpt-oss); None for no such key. An anchor's, and so in what
      its followers attend with.
    causal: whether a query sees no key after its own slot. If not, queries and keys may differ in number, as in
      cross-attention, and a window reaches to both sides.
    pages: where the rows lie in a cache of pages, whose first axis is P and not B; None for a slot after the other.
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
    """The slots of so many queries among the keys, int32 ``[T]``, or ``[B, T]`` where rows differ."""
    slots = jnp.arange(queries)
    if self.offset is None:
      return slots
    return jnp.expand_dims(self.offset, -1) + (slots if self.offset.ndim == 0 else slots[None])

  @property
  def demands(self) -> tuple[str, ...]:
    """What these rows ask of a backend besides causal attention over whole right-padded rows, in words."""
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
    """What is no array that attention of these sizes takes, a line each."""
    square = f"[B or 1, N or 1, T, S], of {(batch, heads, queries, keys)}"
    squares = [(rows, each, queries, keys) for rows in (1, batch) for each in (1, heads)]
    return [
      f"{wanted}; not {described(array)}"
      for array, kind, shapes, wanted in (
        (self.lengths, jnp.integer, [(batch,)], f"lengths are integers, one number a row, {(batch,)}"),
        (self.segments, jnp.integer, [(batch, keys)], f"segments are integers, one number a slot, {(batch, keys)}"),
        (self.offset, jnp.integer, [(), (batch,)], f"offset is an integer, or one a row, {(batch,)}"),
        (self.bias, jnp.floating, squares, f"bias is floating-point {square}"),
        (self.mask, jnp.bool_, squares, f"mask is bool {square}"),
        (self.sinks, jnp.floating, [(heads,)], f"sinks are floating-point numbers, one a head, {(heads,)}"),
      )
      if array is not None and not (is_array(array, kind) and array.shape in shapes)
    ]


def is_array(value: object, kind: DTypeLike = jnp.generic) -> bool:
  """Whether a value is an array, or is described like one, of such numbers."""
  return hasattr(value, "shape") and hasattr(value, "dtype") and jnp.issubdtype(value.dtype, kind)


def described(value: object) -> str:
  """What a value is, for an error about arrays."""
  if hasattr(value, "shape") and hasattr(value, "dtype"):
    return f"{value.dtype} of shape {value.shape}"
  return f"a Python {type(value).__name__}, of which np.asarray makes an array"


def heads_grouped(x: jax.Array, kv_heads: int) -> jax.Array:
  """A bias or mask ``[B or 1, N or 1, T, S]`` by key heads: ``[B or 1, K or 1, G or 1, T, S]``."""
  batch, heads, queries, keys = x.shape
  grouped = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
  return x.reshape(batch, *grouped, queries, keys)
