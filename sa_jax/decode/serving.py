"""Settings of continuous batching, and its page table."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.errors import UserError
from sa_jax.fields import Count, check_fields

_PAGE = 64
"""Min slots per page: the decode kernels read at least this many at a time."""
_MOST_PAGES = 32
"""Pages of the longest row, about: each adds a few bytes of partial sums, and the last is half empty on average."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """How a `Batcher` serves.

  Attributes:
    slots: rows of the batch.
    capacity: cache slots per row; a prompt and its continuation, except the last token, must fit.
    cache_slots: total slots of a paged cache. A row reserves only the pages that its prompt and token limit need, so
      more rows fit. None for ``capacity`` slots in every row.
    chunk: max decode steps per host round trip; ends early when a slot frees up and requests wait. The host sees new
      tokens and cancellations only at round trips.
    together: how many slots must be free to end early. A larger number prefills prompts together, but leaves slots
      empty in the meantime.
    read: max prompt tokens per step while rows are running, or one short prompt. Longer prompts are prefilled in chunks
      of this size, and no other request enters in the meantime. None prefills whole prompts while running rows wait.
    longest_first: whether the waiting request with the most new tokens goes first, which keeps the batch full to the
      end if all requests are known from the start. Otherwise first come, first served.

  Raises:
    UserError: if a number is not an integer of at least 1, or the cache has no room for the longest row.
  """

  slots: Count = 16
  capacity: Count = 2048
  cache_slots: Count | None = None
  chunk: Count = 16
  together: Count = 1
  read: Count | None = None
  longest_first: bool = False

  def __post_init__(self) -> None:
    check_fields(self, "serving")
    if self.cache_slots is not None and self.page_count < (needed := self.pages_for(self.capacity)):
      raise UserError(
        f"cache_slots={self.cache_slots} (must be at least {needed * self.page_size} for a row of capacity "
        f"{self.capacity} in pages of {self.page_size})"
      )

  @property
  def page_size(self) -> int:
    """Slots per page: a power of two, large enough that the longest row has few pages."""
    return max(_PAGE, 1 << (-(-self.capacity // _MOST_PAGES) - 1).bit_length())

  @property
  def page_count(self) -> int:
    """Number of pages in the cache."""
    assert self.cache_slots is not None, "a cache without pages has rows"
    return self.cache_slots // self.page_size

  def pages_for(self, slots: int) -> int:
    """Number of pages for this many slots of a row."""
    return -(-slots // self.page_size)


class PageTable:
  """The host's table of the pages that each row of a batch has.

  Attributes:
    free: number of free pages.
  """

  def __init__(self, how: Serving):
    self._how = how
    self._free = list(range(how.page_count))
    self._of_row: dict[int, list[int]] = {}

  @property
  def free(self) -> int:
    """Number of free pages."""
    return len(self._free)

  def keep(self, rows: Collection[int]) -> None:
    """Frees the pages of all other rows."""
    for row in set(self._of_row) - set(rows):
      for page in self._of_row.pop(row):
        heapq.heappush(self._free, page)

  def take(self, row: int, count: int) -> None:
    """Allocates pages for a row that has none."""
    assert row not in self._of_row, f"row {row} has pages"
    self._of_row[row] = [heapq.heappop(self._free) for _ in range(count)]

  def pages(self) -> ops.Pages:
    """The table for the device."""
    how = self._how
    table = np.full((how.slots, how.pages_for(how.capacity)), how.page_count, np.int32)
    owners, firsts = np.full(how.page_count, -1, np.int32), np.zeros(how.page_count, np.int32)
    for row, pages in self._of_row.items():
      table[row, : len(pages)] = pages
      owners[pages], firsts[pages] = row, how.page_size * np.arange(len(pages))
    return ops.Pages(*map(jnp.asarray, (table, owners, firsts)))
