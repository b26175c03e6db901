"""Continuous batching: rows enter a running batch as others leave it."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sa_jax.decode.arguments import as_count, check_seed
from sa_jax.decode.engine import Drawn, Engine, Prompts, pad_to, retire
from sa_jax.decode.prefix import PromptCache
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.unsound import tell_unsound
from sa_jax.distributed import check_given, is_spread
from sa_jax.errors import UserError
from sa_jax.nn import Transformer
from sa_jax.nn.transformer import check_tokens
from sa_jax.params import as_layers
from sa_jax.programs import fetch
from sa_jax.trees import Params

_UNWATCHED = 128
"""Most decode steps on device where nobody waits for tokens: each return to the host costs time (1.4 ms on an H200)."""


@dataclasses.dataclass(eq=False)
class Request:
  """A prompt on its way.

  Attributes:
    prompt: int32 ``[T]``.
    max_new_tokens: most tokens to add.
    seed: with ``row``, chooses its samples as in `sa_jax.generate`.
    row: a number that tells it from others with the same seed.
    tokens: what it has generated so far.
    log_probs: of these tokens, where the sampler tells them.
    status: where it is.
  """

  prompt: np.ndarray
  max_new_tokens: int
  seed: int
  row: int
  tokens: list[int] = dataclasses.field(default_factory=list)
  log_probs: list[float] = dataclasses.field(default_factory=list)
  status: Literal["waiting", "running", "done", "cancelled"] = "waiting"


class Batcher:
  """Generates for many requests at once, in a batch of ``slots`` rows.

  A request waits for a free slot, is prefilled (padded to one of a few lengths, so that few programs are compiled),
  joins the running batch, and frees its slot when it ends. What it generates does not depend on the requests beside it.

  Attributes:
    slots: rows of the batch.
    capacity: cache slots a row: a prompt and its continuation, but for the last token, must fit.
    chunk: most decode steps on device between two looks of the host, at which new tokens and cancellations are seen; a
      slot that becomes free while a request waits for it ends them early.
    longest_first: whether the waiting request with the most tokens to add goes first, so that the batch stays full to
      the end, where all requests are known from the start; otherwise they go in the order of their arrival.
    sampler: how tokens are drawn.
    prefix: a beginning that prompts may share, which is not read again; see `PromptCache`.
  """

  def __init__(
    self,
    model: Transformer,
    params: Params,
    *,
    slots: int = 16,
    capacity: int = 2048,
    sampler: Sampler = Sampler(),
    chunk: int = 16,
    longest_first: bool = False,
    prefix: PromptCache | None = None,
  ):
    sampler.check(model.config.vocab_size)
    if slots < 1 or capacity < 1 or chunk < 1:
      raise UserError(f"slots, capacity and chunk must be at least 1, not {slots}, {capacity} and {chunk}")
    self.slots, self.capacity, self.chunk, self.longest_first = slots, capacity, chunk, longest_first
    self.prefix = prefix
    self._params, self.sampler = as_layers(params, model.plan), sampler
    self._engine = Engine.of(model, self._params)
    self._state = self._engine.empty(slots, capacity, sampler)
    self._waiting: collections.deque[Request] = collections.deque()
    # Any thread may submit and cancel; one steps at a time.
    self._queue, self._stepping = threading.Lock(), threading.Lock()
    self._running: dict[int, Request] = {}
    self._told = False

  def submit(self, prompt: Sequence[int] | np.ndarray, max_new_tokens: int, *, seed: int = 0, row: int = 0) -> Request:
    """Queues a prompt; ``seed`` and ``row`` choose its samples as in `sa_jax.generate`.

    Raises:
      UserError: if the prompt is empty, has a token outside the vocabulary, or does not fit the cache with its
        continuation. Other requests go on.
    """
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not tokens.size:
      raise UserError(f"a prompt is a list of at least one token, not of shape {tokens.shape}")
    check_tokens(tokens[None], None, self._engine.model.config.vocab_size)
    check_seed(seed)
    max_new_tokens = as_count("max_new_tokens", max_new_tokens)
    if (needed := len(tokens) + max_new_tokens - 1) > self.capacity:
      raise UserError(
        f"a prompt of {len(tokens)} tokens with {max_new_tokens} new ones needs {needed} cache slots, "
        f"and a row has {self.capacity}"
      )
    request = Request(tokens.astype(np.int32), max_new_tokens, seed, row)
    with self._queue:
      self._waiting.append(request)
    return request

  def cancel(self, request: Request) -> None:
    """Stops a request; its slot is free at the next `step`. What it has generated stays in ``request.tokens``."""
    with self._queue:
      if request.status == "waiting":
        self._waiting.remove(request)
      if request.status in ("waiting", "running"):
        request.status = "cancelled"

  @property
  def busy(self) -> bool:
    """Whether any request is waiting or running."""
    return bool(self._waiting or self._running)

  def step(self) -> dict[int, list[int]]:
    """Fills free slots, decodes up to ``chunk`` tokens a row, and collects them.

    Returns:
      New tokens by ``id(request)``, for streaming; they are in ``request.tokens`` too.
    """
    return self._step(self.chunk)

  def enter(self) -> dict[int, list[int]]:
    """Fills free slots and collects first tokens, for who waits for them: `step` gives them with a chunk of others.

    Returns:
      As `step`.
    """
    return self._step(0)

  def run(self) -> None:
    """Steps until no request is left; as nobody looks in between, the host does only where a slot is to be filled."""
    while self.busy:
      self._step(max(self.chunk, _UNWATCHED))

  def _step(self, chunk: int) -> dict[int, list[int]]:
    with self._stepping:
      self._check_alike(chunk)
      self._drop_cancelled()
      first = self._fill_slots()
      return self._collect(first, self._decode(chunk) if chunk else None) if self._running else {}

  def _check_alike(self, chunk: int) -> None:
    """Checks that processes which step together have the same requests, in the same order."""
    if is_spread(self._params):
      with self._queue:
        requests = [
          (each.prompt, each.max_new_tokens, each.seed, each.row, each.status)
          for each in (*self._running.values(), *self._waiting)
        ]
      sizes = self.slots, self.capacity, self.chunk, self.longest_first
      check_given(
        "a step of the batcher", {"requests": requests, "sampler": self.sampler, "sizes": sizes, "chunk": chunk}
      )

  def _decode(self, chunk: int) -> Drawn:
    """A chunk of tokens, still on the device."""
    # While requests wait, one row that ends is enough to stop for: its slot is free.
    enough = np.int32(self.slots - len(self._running) + 1 if self._waiting else self.slots)
    self._state, out = self._engine.decode(
      self._params,
      self._state,
      sampler=self.sampler,
      steps=np.int32(chunk),
      width=max(self.chunk, _UNWATCHED),  # one program, whoever watches
      enough=enough,
    )
    return out

  def _collect(self, first: list[tuple[np.ndarray, Drawn]], out: Drawn | None) -> dict[int, list[int]]:
    """Fetches first tokens by slot, and a chunk's; one transfer: for a small model the host's work is most of it."""
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
      news[id(request)] = new
      if done[slot]:
        request.status = "done"
        del self._running[slot]
    return news

  def _drop_cancelled(self) -> None:
    cancelled = [slot for slot, request in self._running.items() if request.status == "cancelled"]
    if cancelled:
      self._state = retire(self._state, np.isin(np.arange(self.slots), cancelled))
    for slot in cancelled:
      del self._running[slot]

  def _fill_slots(self) -> list[tuple[np.ndarray, Drawn]]:
    """Prefills waiting requests into free slots; returns slots and first tokens, on device."""
    free = [slot for slot in range(self.slots) if slot not in self._running]
    by_length: dict[int, dict[int, Request]] = collections.defaultdict(dict)
    for slot, request in zip(free, self._next(len(free))):
      by_length[pad_to(len(request.prompt), self.capacity)][slot] = request
    first = []
    for length, requests in by_length.items():
      slots = list(requests)
      # A power of two at a time: all together in a few programs, whatever their number.
      while slots:
        count = 1 << (len(slots).bit_length() - 1)
        first.append(self._admit(np.array(slots[:count], np.int32), [requests[slot] for slot in slots[:count]], length))
        slots = slots[count:]
    return first

  def _next(self, count: int) -> list[Request]:
    """The waiting requests whose turn it is, at most so many."""
    with self._queue:
      if self.longest_first:
        return heapq.nlargest(count, self._waiting, key=lambda request: request.max_new_tokens)
      return list(itertools.islice(self._waiting, count))

  def _admit(self, slots: np.ndarray, requests: Sequence[Request], length: int) -> tuple[np.ndarray, Drawn]:
    """Prefills requests into slots, padded to a length. Only then do they run: an interruption loses none."""
    rows, new, seeds, numbers = zip(*((each.prompt, each.max_new_tokens, each.seed, each.row) for each in requests))
    prompts = Prompts.of(rows, length, new, seeds, numbers)
    begun = None if self.prefix is None else self.prefix.begun(prompts, self._engine.model)
    self._state, first = self._engine.admit(
      self._params, self._state, slots, prompts, sampler=self.sampler, begun=begun
    )
    with self._queue:
      for slot, request in zip(slots.tolist(), requests, strict=True):
        self._running[slot] = request
        if request.status == "waiting":  # not cancelled meanwhile
          request.status = "running"
      self._waiting = collections.deque(request for request in self._waiting if request.status == "waiting")
    return slots, first


def _row(drawn: Drawn, row: int) -> tuple[list[int], list[float]]:
  """A row's tokens, and their log-probabilities where they are told."""
  there = drawn.tokens[row] >= 0
  return drawn.tokens[row][there].tolist(), [] if drawn.log_probs is None else drawn.log_probs[row][there].tolist()
