"""How a batch serves many requests: its sizes, and the pages of its rows."""

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
"""Slots of the shortest page: the decode kernels read no fewer at once."""
_MOST_PAGES = 32
"""Pages of the longest row, about: each takes a few bytes of what attention sums, and half of the last one is empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
  """How a `Batcher` serves.

  Attributes:
    slots: rows of the batch.
    capacity: cache slots a row: a prompt and its continuation, but for the last token, must fit.
    cache_slots: slots of the cache in all, in pages, of which a row has as many as its prompt and its limit need: short
      rows do not reserve what long ones would, and more rows fit. None for ``capacity`` in every row.
    chunk: most decode steps on device between two looks of the host, at which new tokens and cancellations are seen;
      slots that become free while requests wait for them end them early.
    together: how many slots must be free for that; more let prompts be read together, and leave slots empty meanwhile.
    read: most prompt tokens that are read between two looks while rows run, or one short prompt's: longer prompts are
      read in chunks of so many, and nothing else enters meanwhile. None for whole prompts, however long running rows
      wait.
    longest_first: whether the waiting request with the most tokens to add goes first, so that the batch stays full to
      the end, where all requests are known from the start; otherwise they go in the order of their arrival.

  Raises:
    UserError: if a number is no integer or less than 1, or the cache has no room for the longest row.
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
        f"cache_slots {self.cache_slots} hold no row of {self.capacity} (capacity): in pages of {self.page_size}, "
        f"{needed * self.page_size} are needed"
      )

  @property
  def page_size(self) -> int:
    """Slots of a page: a power of two, so that the longest row has few pages."""
    return max(_PAGE, 1 << (-(-self.capacity // _MOST_PAGES) - 1).bit_length())

  @property
  def page_count(self) -> int:
    """How many pages the cache has."""
    assert self.cache_slots is not None, "a cache without pages has rows"
    return self.cache_slots // self.page_size

  def pages_for(self, slots: int) -> int:
    """How many pages so many slots of a row need."""
    return -(-slots // self.page_size)


class PageTable:
  """Which pages the rows of a batch have, as the host keeps it.

  Attributes:
    free: how many pages no row has.
  """

  def __init__(self, how: Serving):
    self._how = how
    self._free = list(range(how.page_count))
    self._of_row: dict[int, list[int]] = {}

  @property
  def free(self) -> int:
    """How many pages no row has."""
    return len(self._free)

  def keep(self, rows: Collection[int]) -> None:
    """Takes the pages of all other rows back."""
    for row in set(self._of_row) - set(rows):
      for page in self._of_row.pop(row):
        heapq.heappush(self._free, page)

  def take(self, row: int, count: int) -> None:
    """Gives a row that has none so many free pages."""
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
