"""Paged cache: rows of different lengths share one array, each using as many pages as it needs.

A page holds a few slots of one row (Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", arXiv 2309.06180). Attention treats each page as a separate row with its row's query, at an offset
relative to the page's first slot. The results of a row's pages are combined by their log-sum-exps.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

_NOWHERE = -(1 << 30)
"""The offset of a query that sees no slot of a page."""
_NOTHING = -1e30
"""The log-sum-exp of a page with no visible slot: finite, like `sa_jax.ops.attention.reference.MASKED`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """The page table of a cache with P pages, for B rows of up to M pages each.

  Attributes:
    table: int32 ``[B, M]``, the pages of each row in order; P for unused entries.
    owners: int32 ``[P]``, the row that each page belongs to; -1 for none.
    firsts: int32 ``[P]``, the position in its row of each page's first slot.
  """

  table: jax.Array
  owners: jax.Array
  firsts: jax.Array

  def of_rows(self, x: jax.Array) -> jax.Array:
    """Gathers each page's row: ``[B, …]`` → ``[P, …]``. The result is meaningless for pages without a row."""
    return jnp.take(x, self.owners, axis=0, mode="clip")

  def offsets(self, offset: jax.Array) -> jax.Array:
    """Slots of rows, int32 ``[B]``, relative to the first slot of each page, int32 ``[P]``."""
    return jnp.where(self.owners < 0, _NOWHERE, self.of_rows(offset) - self.firsts)

  def summed(self, x: jax.Array) -> jax.Array:
    """The sum over each row's pages: ``[P, …]`` → ``[B, …]``. NaNs in one row do not reach another."""
    return self._by_row(x, 0).sum(axis=1)

  def log_totals(self, log_sums: jax.Array) -> jax.Array:
    """The log-sum-exp over each row's pages: ``[P, …]`` → ``[B, …]``."""
    return jax.nn.logsumexp(self._by_row(jnp.maximum(log_sums, _NOTHING), _NOTHING), axis=1)

  def _by_row(self, x: jax.Array, nothing: float) -> jax.Array:
    """``[P, …]`` → ``[B, M, …]``."""
    return x.at[self.table].get(mode="fill", fill_value=nothing, wrap_negative_indices=False)
