"""Continuous batching: rows enter a running batch as others leave it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from sa_jax.decode.admission import Admission, Entering, Request
from sa_jax.decode.engine import Engine
from sa_jax.decode.nonfinite import warn_nonfinite
from sa_jax.decode.prefix import PromptCache
from sa_jax.decode.reading import Reading, admit_read, begin, read
from sa_jax.decode.room import check_room
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.serving import PageTable, Serving
from sa_jax.decode.state import Drawn, retire
from sa_jax.distributed import check_given, is_multiprocess
from sa_jax.errors import UserError
from sa_jax.nn import Transformer
from sa_jax.nn.transformer import check_tokens
from sa_jax.params import as_layers
from sa_jax.programs import fetch
from sa_jax.trees import Params

_UNWATCHED = 128
"""Max decode steps on device if no caller waits for tokens: each host round trip takes time (1.4 ms on an H200)."""


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
    self._admission = Admission(how, self._table)
    pages = None if self._table is None else self._table.pages()
    capacity = how.capacity if pages is None else pages.table.shape[1] * how.page_size
    self._state = self._engine.empty(how.slots, capacity, sampler, pages)
    self._stepping = threading.Lock()  # any thread may submit and cancel; only one steps at a time
    self._running: dict[int, Request] = {}
    self._prefilling: _ChunkedPrefill | None = None
    self._warned = False

  def submit(self, prompt: Sequence[int] | np.ndarray, max_new_tokens: int, *, seed: int = 0, row: int = 0) -> Request:
    """Queues a prompt; ``seed`` and ``row`` determine its samples as in `sa_jax.generate`.

    Raises:
      UserError: if the prompt is empty, has a token outside the vocabulary, or does not fit the cache with its
        continuation, or the seed or row is invalid. Other requests continue.
    """
    tokens = flat_prompt(prompt)
    check_tokens(tokens[None], None, self._engine.model.config.vocab_size)
    request = Request(tokens.astype(np.int32), max_new_tokens, seed, row)
    self._admission.add(request)
    return request

  def cancel(self, request: Request) -> None:
    """Stops a request; its slot is freed at the next `step`. Tokens generated so far stay in ``request.tokens``.

    Raises:
      UserError: if it is queued in another batcher.
    """
    self._admission.cancel(request)

  @property
  def busy(self) -> bool:
    """Whether any request is waiting or running."""
    return bool(len(self._admission) or self._running)

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
    if is_multiprocess(self._params):
      requests = self._admission.with_waiting(self._running.values())
      check_given(
        "a step of the batcher", {"requests": requests, "sampler": self.sampler, "how": self.how, "chunk": chunk}
      )

  def _decode(self, chunk: int) -> Drawn:
    """Decodes a chunk of tokens; the result stays on the device."""
    # While requests wait, stop as soon as a few rows have ended, to fill their slots.
    slots, width = self.how.slots, min(max(self.how.chunk, _UNWATCHED), self.how.capacity)  # max tokens of a row
    held = self._prefilling is not None or self._admission.held  # requests wait only because rows are running
    wanted = len(self._admission) and not held
    enough = np.int32(min(slots, slots - len(self._running) + self.how.together) if wanted else slots)
    self._state, out = self._engine.decode(
      self._params,
      self._state,
      sampler=self.sampler,
      steps=np.int32(min(chunk, 1 if held else width)),  # free slots wait for the prompt being prefilled
      width=width,  # one program, with or without streaming
      enough=enough,
    )
    return out

  def _collect(self, first: list[tuple[np.ndarray, Drawn]], out: Drawn | None) -> dict[Request, list[int]]:
    """Fetches first tokens by slot and a chunk's tokens in one transfer: with small models, host time dominates."""
    out, done, nonfinite, first = fetch((out, self._state.done, self._state.nonfinite, first))
    if not self._warned:
      slots, running = list(self._running), self._running.values()
      self._warned = warn_nonfinite(
        nonfinite[slots], [len(each.prompt) for each in running], [each.row for each in running]
      )
    firsts = {slot: _row(each, at) for slots, each in first for at, slot in enumerate(slots.tolist())}
    news = {}
    for slot, request in list(self._running.items()):
      parts = [*([firsts[slot]] if slot in firsts else []), *([] if out is None else [_row(out, slot)])]
      new = [token for tokens, _ in parts for token in tokens]
      request.tokens += new
      request.log_probs += [value for _, values in parts for value in values]
      news[request] = new
      if done[slot]:
        self._admission.end(request)
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
    if self._prefilling is not None and self._prefilling.request.status != "waiting":  # cancelled
      self._prefilling = None
    if self._prefilling is None:
      free = [slot for slot in range(self.how.slots) if slot not in self._running]
      groups = self._admission.next(free, busy=bool(self._running))
      if not (groups and groups[0].is_long):
        return [self._admit(entering) for entering in groups]
      self._prefilling = _ChunkedPrefill.of(self._engine, groups[0], self.how, self.prefix)
    return self._continue_prefill(self._prefilling)

  def _admit(self, entering: Entering) -> tuple[np.ndarray, Drawn]:
    """Prefills requests into their slots. They run only after that: an interrupt loses none."""
    prompts = entering.prompts
    prefixes = None if self.prefix is None else self.prefix.match(prompts, self._engine.model)
    self._give_pages(entering)
    self._state, first = self._engine.admit(
      self._params, self._state, entering.slots, prompts, sampler=self.sampler, prefixes=prefixes
    )
    self._run(entering)
    return entering.slots, first

  def _continue_prefill(self, prefilling: _ChunkedPrefill) -> list[tuple[np.ndarray, Drawn]]:
    """Prefills a chunk of a long prompt, or all of the rest if no row runs; returns the same as `_fill_slots`."""
    self._prefilling = None  # an interrupt loses the prefilled chunks, but not the request, which is still waiting
    while prefilling.request.status == "waiting" and not prefilling.is_done:
      prefilling = prefilling.advance(self._engine, self._params)
      if self._running:
        break
    if prefilling.request.status != "waiting":
      return []
    if not prefilling.is_done:
      self._prefilling = prefilling
      return []
    entering = prefilling.entering
    self._give_pages(entering)
    self._state, first = admit_read(
      self._engine, self._params, self._state, entering.slots, prefilling.reading, sampler=self.sampler
    )
    self._run(entering)
    return [(entering.slots, first)]

  def _give_pages(self, entering: Entering) -> None:
    """Allocates the pages that requests need, if the cache is paged."""
    if self._table is not None:
      for slot, request in zip(entering.slots.tolist(), entering.requests, strict=True):
        self._table.take(slot, self.how.pages_for(request.slots))
      cache = dataclasses.replace(self._state.cache, pages=self._table.pages())
      self._state = dataclasses.replace(self._state, cache=cache)

  def _run(self, entering: Entering) -> None:
    """Counts requests as running in their slots."""
    self._running |= zip(entering.slots.tolist(), entering.requests, strict=True)
    self._admission.run(entering.requests)


@dataclasses.dataclass(frozen=True)
class _ChunkedPrefill:
  """A request whose prompt is prefilled in chunks.

  Attributes:
    entering: the request, still waiting, and its slot.
    reading: its prompt.
    chunk: tokens per chunk.
    start: tokens prefilled so far.
  """

  entering: Entering
  reading: Reading
  chunk: int
  start: int = 0

  @classmethod
  def of(cls, engine: Engine, entering: Entering, how: Serving, prefix: PromptCache | None) -> _ChunkedPrefill:
    assert how.read is not None, "prompts are read whole"
    prompts = entering.prompts
    if prefix is None:
      return cls(entering, begin(engine, prompts), how.read)
    prefixes = prefix.match(prompts, engine.model)
    return cls(entering, begin(engine, prompts, prefixes), how.read, int(prefixes.shared[0]))

  @property
  def request(self) -> Request:
    return self.entering.requests[0]

  @property
  def is_done(self) -> bool:
    return self.start >= len(self.request.prompt)

  def advance(self, engine: Engine, params: Params) -> _ChunkedPrefill:
    """Prefills one more chunk."""
    reading = read(engine, params, self.reading, np.int32(self.start), chunk=self.chunk)
    return dataclasses.replace(self, reading=reading, start=self.start + self.chunk)


def flat_prompt(prompt: ArrayLike) -> np.ndarray:
  """A prompt's tokens ``[T]``.

  Raises:
    UserError: if it is empty or nested.
  """
  try:
    tokens = np.asarray(prompt)
  except ValueError:
    raise UserError("a prompt must be a flat list of tokens") from None
  if tokens.ndim != 1 or not tokens.size:
    raise UserError(f"a prompt must be a flat list of at least one token, not of shape {tokens.shape}")
  return tokens


def _row(drawn: Drawn, row: int) -> tuple[list[int], list[float]]:
  """A row's tokens and their log-probabilities, if available."""
  there = drawn.tokens[row] >= 0
  return drawn.tokens[row][there].tolist(), [] if drawn.log_probs is None else drawn.log_probs[row][there].tolist()
