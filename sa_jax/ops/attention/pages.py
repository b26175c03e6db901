"""A cache of pages: rows of unequal length share one array, each in as many pages as it needs.

A page is a few slots of one row (Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", 2023). To attention a page is a row by itself, which has its row's query, at an offset counted from the
page's first slot. What the pages of a row give is joined by their log-sums, as parts of a row are.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_NOWHERE = -(1 << 30)
"""The offset of a query that sees nothing of a page."""
_NOTHING = -1e30
"""The log-sum of a page of which nothing is seen: finite, as `sa_jax.ops.attention.reference.MASKED` is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """Which page of a cache has which slots of which row.

  Attributes:
    table: int32 ``[B, M]``, the pages of each row in order; P where a row has fewer.
    owners: int32 ``[P]``, the row that each page belongs to; -1 for none.
    firsts: int32 ``[P]``, the slot of its row that a page's first slot is.
  """

  table: jax.Array
  owners: jax.Array
  firsts: jax.Array

  def of_rows(self, x: jax.Array) -> jax.Array:
    """What each page's row has: ``[B, …]`` → ``[P, …]``; of a page of no row it means nothing."""
    return jnp.take(x, self.owners, axis=0, mode="clip")

  def offsets(self, offset: jax.Array) -> jax.Array:
    """Slots of rows int32 ``[B]``, counted from the first slot of each of their pages, int32 ``[P]``."""
    return jnp.where(self.owners < 0, _NOWHERE, self.of_rows(offset) - self.firsts)

  def summed(self, x: jax.Array) -> jax.Array:
    """The sum over each row's pages: ``[P, …]`` → ``[B, …]``. No row sees another's numbers, which may be NaN."""
    return self._by_row(x, 0).sum(axis=1)

  def log_totals(self, log_sums: jax.Array) -> jax.Array:
    """The log-sum of each row, of those of its pages: ``[P, …]`` → ``[B, …]``."""
    return jax.nn.logsumexp(self._by_row(jnp.maximum(log_sums, _NOTHING), _NOTHING), axis=1)

  def _by_row(self, x: jax.Array, nothing: float) -> jax.Array:
    """``[P, …]`` → ``[B, M, …]``."""
    return x.at[self.table].get(mode="fill", fill_value=nothing, wrap_negative_indices=False)
