"""Requests of a batcher: those that wait, and which of them enter next."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np

from sa_jax.decode.engine import pad_to
from sa_jax.decode.serving import PageTable, Serving
from sa_jax.decode.state import Prompts
from sa_jax.errors import UserError
from sa_jax.fields import Constraint, Count, Seed, check_fields

RowNumber = Annotated[int, Constraint(lambda number: 0 <= number < 1 << 31, f"0 to {(1 << 31) - 1}")]


@dataclasses.dataclass(eq=False)
class Request:
  """A prompt being continued.

  Attributes:
    prompt: int32 ``[T]``.
    max_new_tokens: max tokens to add.
    seed: with ``row``, determines its samples as in `sa_jax.generate`.
    row: distinguishes it from others with the same seed.
    tokens: tokens generated so far.
    log_probs: their log-probabilities, if the sampler returns them.
    status: its current state.
  """

  prompt: np.ndarray
  max_new_tokens: Count
  seed: Seed
  row: RowNumber
  tokens: list[int] = dataclasses.field(default_factory=list)
  log_probs: list[float] = dataclasses.field(default_factory=list)
  status: Literal["waiting", "running", "done", "cancelled"] = "waiting"

  def __post_init__(self) -> None:
    check_fields(self, "request")

  @property
  def slots(self) -> int:
    """Cache slots that it needs: its last token is returned but never cached."""
    return len(self.prompt) + self.max_new_tokens - 1


class Entering(NamedTuple):
  """Requests that are prefilled together.

  Attributes:
    slots: int32 ``[rows]``, the slots they get.
    requests: one per slot.
    length: the padded length of their prompts.
    is_long: whether this is one prompt that running rows would wait for too long, unless it is prefilled in chunks.
  """

  slots: np.ndarray
  requests: Sequence[Request]
  length: int
  is_long: bool

  @property
  def prompts(self) -> Prompts:
    """Their prompts."""
    values = ((each.prompt, each.max_new_tokens, each.seed, each.row) for each in self.requests)
    rows, new, seeds, numbers = zip(*values)
    return Prompts.of(rows, self.length, new, seeds, numbers)


class Admission:
  """The requests that wait for slots of a batch, and for pages if it has a page table; any thread may add and cancel.

  Attributes:
    held: whether requests that could enter wait for running rows to go on first.
  """

  def __init__(self, how: Serving, table: PageTable | None):
    self.held = False
    self._how, self._table = how, table
    self._waiting: collections.deque[Request] = collections.deque()
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._waiting)

  def add(self, request: Request) -> None:
    """Queues a request.

    Raises:
      UserError: if it does not fit a row.
    """
    if request.slots > self._how.capacity:
      raise UserError(
        f"a prompt of {len(request.prompt)} tokens with {request.max_new_tokens} new ones needs {request.slots} cache "
        f"slots, but a row has {self._how.capacity}"
      )
    with self._lock:
      self._waiting.append(request)

  def cancel(self, request: Request) -> None:
    """Removes a waiting request, and marks a waiting or running one as cancelled.

    Raises:
      UserError: if it waits elsewhere.
    """
    with self._lock:
      if request.status == "waiting":
        if request not in self._waiting:
          raise UserError("the request belongs to another batcher: cancel it there")
        self._waiting.remove(request)
      if request.status in ("waiting", "running"):
        request.status = "cancelled"

  def run(self, requests: Iterable[Request]) -> None:
    """Marks waiting requests as running, except those cancelled in the meantime."""
    with self._lock:
      for request in requests:
        if request.status == "waiting":
          request.status = "running"
      self._waiting = collections.deque(request for request in self._waiting if request.status == "waiting")

  def end(self, request: Request) -> None:
    """Marks a running request as done, unless it was cancelled in the meantime."""
    with self._lock:
      if request.status == "running":
        request.status = "done"

  def with_waiting(self, running: Iterable[Request]) -> list[tuple[object, ...]]:
    """What describes the running requests and then the waiting ones, at one moment."""
    with self._lock:
      return [
        (each.prompt, each.max_new_tokens, each.seed, each.row, each.status) for each in (*running, *self._waiting)
      ]

  def next(self, free: Sequence[int], busy: bool) -> list[Entering]:
    """The next requests for free slots, for which there are pages; while rows are running, no more than `Serving.read`.

    Args:
      free: the free slots.
      busy: whether rows are running.

    Returns:
      Groups of one padded length, in powers of two, so that few programs are compiled; or one long prompt.
    """
    with self._lock:
      if self._how.longest_first:
        order = heapq.nlargest(len(free), self._waiting, key=lambda request: request.max_new_tokens)
      else:
        order = list(itertools.islice(self._waiting, len(free)))
    limit = self._how.read if busy else None
    is_long = limit is not None and bool(order) and len(order[0].prompt) > limit
    by_length: dict[int, list[tuple[int, Request]]] = collections.defaultdict(list)
    for slot, request in zip(free, self._fitting(order[:1] if is_long else order, limit), strict=False):
      by_length[self._padded(request)].append((slot, request))
    found = []
    for length, pairs in by_length.items():
      while pairs:
        count = 1 << (len(pairs).bit_length() - 1)
        slots, requests = zip(*pairs[:count])
        found.append(Entering(np.array(slots, np.int32), requests, length, is_long))
        pairs = pairs[count:]
    return found

  def _fitting(self, requests: list[Request], limit: int | None) -> list[Request]:
    """The first of the requests: as many as there are pages for, and with at most ``limit`` tokens, or one."""
    pages = tokens = 0
    self.held = False
    for at, request in enumerate(requests):
      pages, tokens = pages + self._how.pages_for(request.slots), tokens + self._padded(request)
      if self._table is not None and pages > self._table.free:
        return requests[:at]
      if limit is not None and tokens > limit and at > 0:
        self.held = True
        return requests[:at]
    return requests

  def _padded(self, request: Request) -> int:
    return pad_to(len(request.prompt), self._how.capacity)
