"""Continuous batching: rows enter a running batch as others leave it."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import threading
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from sa_jax.decode.engine import Engine, pad_to
from sa_jax.decode.prefix import PromptCache
from sa_jax.decode.reading import Reading, admit_read, begin, read
from sa_jax.decode.room import check_room
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.serving import PageTable, Serving
from sa_jax.decode.state import Drawn, Prompts, retire
from sa_jax.decode.unsound import tell_unsound
from sa_jax.distributed import check_given, is_spread
from sa_jax.errors import UserError
from sa_jax.fields import Count, Seed, Such, check_fields
from sa_jax.nn import Transformer
from sa_jax.nn.transformer import check_tokens
from sa_jax.params import as_layers
from sa_jax.programs import fetch
from sa_jax.trees import Params

_UNWATCHED = 128
"""Max decode steps on device if no caller waits for tokens: each host round trip takes time (1.4 ms on an H200)."""


RowNumber = Annotated[int, Such(lambda number: 0 <= number < 1 << 31, f"0 to {(1 << 31) - 1}")]


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


class Batcher:
  """Generates for many requests concurrently, in a batch of ``how.slots`` rows.

  A request waits for a free slot (and for pages, if the cache is paged), is prefilled (padded to one of a few lengths,
  so that few programs are compiled), joins the running batch, and frees its slot when it ends. Its tokens do not depend
  on the other requests.

  Attributes:
    how: sizes, and the order of requests.
    sampler: how tokens are sampled.
    prefix: a prefix that prompts may share, which is not prefilled again; see `PromptCache`.
  """

  def __init__(
    self,
    model: Transformer,
    params: Params,
    how: Serving = Serving(),
    *,
    sampler: Sampler = Sampler(),
    prefix: PromptCache | None = None,
  ):
    """Creates an empty batch.

    Raises:
      UserError: if it does not fit in memory, is paged on a mesh, or the prefix is another model's.
    """
    sampler.check(model.config.vocab_size)
    if prefix is not None:
      prefix.check(model)
    self.how, self.prefix = how, prefix
    self._params, self.sampler = as_layers(params, model.plan), sampler
    self._engine = Engine.of(model, self._params)
    if how.cache_slots is not None:  # checked first: the host's page table would not fit either
      check_room(how.page_count, how.page_size, self._engine.mesh, model)
    self._table = None if how.cache_slots is None else PageTable(how)
    pages = None if self._table is None else self._table.pages()
    capacity = how.capacity if pages is None else pages.table.shape[1] * how.page_size
    self._state = self._engine.empty(how.slots, capacity, sampler, pages)
    self._waiting: collections.deque[Request] = collections.deque()
    # Any thread may submit and cancel; only one steps at a time.
    self._queue, self._stepping = threading.Lock(), threading.Lock()
    self._running: dict[int, Request] = {}
    self._begun: _Begun | None = None
    self._held = False  # whether requests wait only because rows are running
    self._told = False

  def submit(self, prompt: Sequence[int] | np.ndarray, max_new_tokens: int, *, seed: int = 0, row: int = 0) -> Request:
    """Queues a prompt; ``seed`` and ``row`` determine its samples as in `sa_jax.generate`.

    Raises:
      UserError: if the prompt is empty, has a token outside the vocabulary, or does not fit the cache with its
        continuation, or the seed or row is invalid. Other requests continue.
    """
    try:
      tokens = np.asarray(prompt)
    except ValueError:
      raise UserError("a prompt is a list of tokens, not of lists of different lengths") from None
    if tokens.ndim != 1 or not tokens.size:
      raise UserError(f"a prompt is a list of at least one token, not of shape {tokens.shape}")
    check_tokens(tokens[None], None, self._engine.model.config.vocab_size)
    request = Request(tokens.astype(np.int32), max_new_tokens, seed, row)
    if (needed := len(tokens) + request.max_new_tokens - 1) > self.how.capacity:
      raise UserError(
        f"a prompt of {len(tokens)} tokens with {request.max_new_tokens} new ones needs {needed} cache slots, "
        f"and a row has {self.how.capacity}"
      )
    with self._queue:
      self._waiting.append(request)
    return request

  def cancel(self, request: Request) -> None:
    """Stops a request; its slot is freed at the next `step`. Tokens generated so far stay in ``request.tokens``.

    Raises:
      UserError: if it is queued in another batcher.
    """
    with self._queue:
      if request.status == "waiting":
        if request not in self._waiting:
          raise UserError("the request belongs to another batcher: cancel it there")
        self._waiting.remove(request)
      if request.status in ("waiting", "running"):
        request.status = "cancelled"

  @property
  def busy(self) -> bool:
    """Whether any request is waiting or running."""
    return bool(self._waiting or self._running)

  def step(self) -> dict[Request, list[int]]:
    """Fills free slots, decodes up to ``chunk`` tokens per row, and collects them.

    Returns:
      New tokens by request, for streaming; also appended to ``request.tokens``.
    """
    return self._step(self.how.chunk)

  def enter(self) -> dict[Request, list[int]]:
    """Fills free slots and collects first tokens, for low latency: `step` returns them together with a whole chunk.

    Returns:
      As `step`.
    """
    return self._step(0)

  def run(self) -> None:
    """Steps until no request is left; the host is involved only when a slot can be filled."""
    while self.busy:
      self._step(max(self.how.chunk, _UNWATCHED))

  def _step(self, chunk: int) -> dict[Request, list[int]]:
    with self._stepping:
      self._check_alike(chunk)
      self._drop_cancelled()
      first = self._fill_slots()
      return self._collect(first, self._decode(chunk) if chunk else None) if self._running else {}

  def _check_alike(self, chunk: int) -> None:
    """Checks that processes stepping together have the same requests in the same order."""
    if is_spread(self._params):
      with self._queue:
        requests = [
          (each.prompt, each.max_new_tokens, each.seed, each.row, each.status)
          for each in (*self._running.values(), *self._waiting)
        ]
      check_given(
        "a step of the batcher", {"requests": requests, "sampler": self.sampler, "how": self.how, "chunk": chunk}
      )

  def _decode(self, chunk: int) -> Drawn:
    """Decodes a chunk of tokens; the result stays on the device."""
    # While requests wait, stop as soon as a few rows have ended, to fill their slots.
    slots, width = self.how.slots, min(max(self.how.chunk, _UNWATCHED), self.how.capacity)  # max tokens of a row
    wanted = self._waiting and not self._held
    enough = np.int32(min(slots, slots - len(self._running) + self.how.together) if wanted else slots)
    self._state, out = self._engine.decode(
      self._params,
      self._state,
      sampler=self.sampler,
      steps=np.int32(min(chunk, 1 if self._held else width)),  # free slots wait for the prompt being prefilled
      width=width,  # one program, with or without streaming
      enough=enough,
    )
    return out

  def _collect(self, first: list[tuple[np.ndarray, Drawn]], out: Drawn | None) -> dict[Request, list[int]]:
    """Fetches first tokens by slot and a chunk's tokens in one transfer: with small models, host time dominates."""
    out, done, unsound, first = fetch((out, self._state.done, self._state.unsound, first))
    if not self._told:
      slots, running = list(self._running), self._running.values()
      self._told = tell_unsound(unsound[slots], [len(each.prompt) for each in running], [each.row for each in running])
    drawn = [(slot, _row(each, at)) for slots, each in first for at, slot in enumerate(slots.tolist())]
    firsts = dict(drawn)
    news = {}
    for slot, request in list(self._running.items()):
      parts = [*([firsts[slot]] if slot in firsts else []), *([] if out is None else [_row(out, slot)])]
      new = [token for tokens, _ in parts for token in tokens]
      request.tokens += new
      request.log_probs += [value for _, values in parts for value in values]
      news[request] = new
      if done[slot]:
        with self._queue:
          if request.status == "running":  # not cancelled in the meantime
            request.status = "done"
        del self._running[slot]
    return news

  def _drop_cancelled(self) -> None:
    cancelled = [slot for slot, request in self._running.items() if request.status == "cancelled"]
    if cancelled:
      self._state = retire(self._state, np.isin(np.arange(self.how.slots), cancelled))
    for slot in cancelled:
      del self._running[slot]

  def _fill_slots(self) -> list[tuple[np.ndarray, Drawn]]:
    """Prefills waiting requests into free slots; returns slots and first tokens (on device)."""
    if self._table is not None:
      self._table.keep(self._running)
    free = [slot for slot in range(self.how.slots) if slot not in self._running]
    if self._begun is not None and self._begun.request.status != "waiting":  # cancelled
      self._begun = None
    chosen = [] if self._begun else self._next(len(free))
    if chosen and self._is_long(chosen[0]):
      self._begun = _Begun.of(self._engine, chosen[0], self.how, self.prefix)
    if self._begun is not None:
      return self._read_on(self._begun, free)
    by_length: dict[int, dict[int, Request]] = collections.defaultdict(dict)
    for slot, request in zip(free, chosen):
      by_length[self._padded(request)][slot] = request
    first = []
    for length, requests in by_length.items():
      slots = list(requests)
      # In powers of two, so that any number of requests needs few programs.
      while slots:
        count = 1 << (len(slots).bit_length() - 1)
        first.append(self._admit(np.array(slots[:count], np.int32), [requests[slot] for slot in slots[:count]], length))
        slots = slots[count:]
    return first

  def _next(self, count: int) -> list[Request]:
    """The next waiting requests: at most ``count``, within the free pages and the prefill limit per step."""
    with self._queue:
      if self.how.longest_first:
        order = heapq.nlargest(count, self._waiting, key=lambda request: request.max_new_tokens)
      else:
        order = list(itertools.islice(self._waiting, count))
    pages = tokens = 0
    self._held = False
    for at, request in enumerate(order):
      pages, tokens = pages + self._pages_for(request), tokens + self._padded(request)
      if self._table is not None and pages > self._table.free:
        return order[:at]
      if self._running and self.how.read is not None and tokens > self.how.read and at > 0:
        self._held = True
        return order[:at]
    return order

  def _padded(self, request: Request) -> int:
    return pad_to(len(request.prompt), self.how.capacity)

  def _pages_for(self, request: Request) -> int:
    return self.how.pages_for(len(request.prompt) + request.max_new_tokens - 1)

  def _is_long(self, request: Request) -> bool:
    """Whether prefilling a request's whole prompt would stall running rows too long."""
    return bool(self._running) and self.how.read is not None and len(request.prompt) > self.how.read

  def _read_on(self, begun: _Begun, free: Sequence[int]) -> list[tuple[np.ndarray, Drawn]]:
    """Prefills a chunk of a long prompt, or all of the rest if no row runs; returns the same as `_fill_slots`."""
    # An interrupt loses the prefilled chunks, but not the request, which is still waiting.
    self._begun, self._held = None, False
    while begun.request.status == "waiting" and not begun.is_read:
      begun = begun.read_on(self._engine, self._params)
      if self._running:
        break
    if begun.request.status != "waiting":
      return []
    if not begun.is_read:
      self._begun, self._held = begun, True
      return []
    slots = np.array(free[:1], np.int32)
    self._give_pages(slots, [begun.request])
    self._state, first = admit_read(self._engine, self._params, self._state, slots, begun.reading, sampler=self.sampler)
    self._run_at(slots, [begun.request])
    return [(slots, first)]

  def _admit(self, slots: np.ndarray, requests: Sequence[Request], length: int) -> tuple[np.ndarray, Drawn]:
    """Prefills requests into slots, padded to a length. They run only after that: an interrupt loses none."""
    prompts = _prompts(requests, length)
    begun = None if self.prefix is None else self.prefix.begun(prompts, self._engine.model)
    self._give_pages(slots, requests)
    self._state, first = self._engine.admit(
      self._params, self._state, slots, prompts, sampler=self.sampler, begun=begun
    )
    self._run_at(slots, requests)
    return slots, first

  def _give_pages(self, slots: np.ndarray, requests: Sequence[Request]) -> None:
    """Allocates the pages that the requests need, if the cache is paged."""
    if self._table is not None:
      for slot, request in zip(slots.tolist(), requests, strict=True):
        self._table.take(slot, self._pages_for(request))
      cache = dataclasses.replace(self._state.cache, pages=self._table.pages())
      self._state = dataclasses.replace(self._state, cache=cache)

  def _run_at(self, slots: np.ndarray, requests: Sequence[Request]) -> None:
    """Marks waiting requests as running in slots."""
    with self._queue:
      for slot, request in zip(slots.tolist(), requests, strict=True):
        self._running[slot] = request
        if request.status == "waiting":  # not cancelled in the meantime
          request.status = "running"
      self._waiting = collections.deque(request for request in self._waiting if request.status == "waiting")


@dataclasses.dataclass(frozen=True)
class _Begun:
  """A request whose prompt is prefilled in chunks.

  Attributes:
    request: the request, still waiting.
    reading: its prompt.
    chunk: tokens per chunk.
    start: tokens prefilled so far.
  """

  request: Request
  reading: Reading
  chunk: int
  start: int = 0

  @classmethod
  def of(cls, engine: Engine, request: Request, how: Serving, prefix: PromptCache | None) -> _Begun:
    assert how.read is not None, "prompts are read whole"
    prompts = _prompts([request], pad_to(len(request.prompt), how.capacity))
    if prefix is None:
      return cls(request, begin(engine, prompts), how.read)
    begun = prefix.begun(prompts, engine.model)
    return cls(request, begin(engine, prompts, begun), how.read, int(begun.shared[0]))

  @property
  def is_read(self) -> bool:
    return self.start >= len(self.request.prompt)

  def read_on(self, engine: Engine, params: Params) -> _Begun:
    """Prefills one more chunk."""
    reading = read(engine, params, self.reading, np.int32(self.start), chunk=self.chunk)
    return dataclasses.replace(self, reading=reading, start=self.start + self.chunk)


def _prompts(requests: Sequence[Request], length: int) -> Prompts:
  """The requests' prompts, padded to a length."""
  rows, new, seeds, numbers = zip(*((each.prompt, each.max_new_tokens, each.seed, each.row) for each in requests))
  return Prompts.of(rows, length, new, seeds, numbers)


def _row(drawn: Drawn, row: int) -> tuple[list[int], list[float]]:
  """A row's tokens and their log-probabilities, if available."""
  there = drawn.tokens[row] >= 0
  return drawn.tokens[row][there].tolist(), [] if drawn.log_probs is None else drawn.log_probs[row][there].tolist()
