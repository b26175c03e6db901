"""Log-likelihoods of continuations given their contexts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax import ops
from sa_jax.costs import cost
from sa_jax.decode.padding import right_pad
from sa_jax.display import Progress
from sa_jax.distributed import check_given, is_multiprocess
from sa_jax.errors import UserError
from sa_jax.evaluation.prefixes import Family, Row, families, padded_size, rows_of_requests
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.params import as_layers
from sa_jax.programs import fetch_each, program
from sa_jax.sharding import mesh_of, where_parameters_are
from sa_jax.trees import Params

_LOG = logging.getLogger("sa_jax")
_T = TypeVar("_T")

_CHUNK = 512
"""Positions per chunk of logits."""

_KEYS = 1024
"""A query with more visible keys than this counts as several tokens of a batch."""

_COMPILE_SECONDS = 0.25
"""Compile time per layer. This and the rates are orders of magnitude, to trade programs against padding."""

_CPU_RATE, _ACCELERATOR_RATE = 1e11, 1e14
"""FLOP/s."""


class Scored(NamedTuple):
  """The score of one continuation.

  Attributes:
    log_likelihood: of the continuation given its context, in nats.
    greedy: whether each of its tokens is the most likely one at its position.
  """

  log_likelihood: float
  greedy: bool


@program(static_argnames="model")
def _read(model: Transformer, params: Params, tokens: jax.Array, lengths: jax.Array) -> Cache:
  """The cache of right-padded rows ``[B, T]``."""
  _LOG.info("compiling the cache of %s × %s tokens", *tokens.shape)
  return apply(model, params, Transformer.prefill, tokens, lengths)[1]


@program(static_argnames="model")
def _hidden(model: Transformer, params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
  """The head's input ``[B, T, D]`` for right-padded rows."""
  _LOG.info("compiling the scores of %s × %s tokens", *tokens.shape)
  return apply(model, params, Transformer.hidden, tokens, ops.Rows(lengths))


@program(static_argnames="model")
def _hidden_after(
  model: Transformer,
  params: Params,
  cache: Cache,
  owners: jax.Array,
  tokens: jax.Array,
  rows: ops.Rows,
) -> jax.Array:
  """The head's input for ``tokens [B, T]``, each row following the part of a cached row before its offset."""
  _LOG.info("compiling the scores of %s × %s tokens after %s", *tokens.shape, cache.capacity)
  room = ((0, 0), (0, 0), (0, tokens.shape[1]), (0, 0))
  own = jax.tree.map(lambda x: jnp.pad(jnp.take(x, owners, axis=0, mode="clip"), room), cache)
  return apply(model, params, Transformer.extend, tokens, own, rows)[0]


@program(static_argnames="model")
def _scores(
  model: Transformer, params: Params, hidden: jax.Array, places: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Log-likelihoods ``[M]`` of targets at some of the B × T positions, and whether each is the most likely token."""

  def one(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    places, targets = chunk
    logits = apply(model, params, Transformer.logits, jnp.take(flat, places, axis=0, mode="clip")[None])[0]
    return ops.token_log_likelihoods(logits, targets), logits.argmax(axis=-1) == targets

  flat = hidden.reshape(-1, hidden.shape[-1])
  split = lambda x: x.reshape(-1, min(_CHUNK, len(x)))
  scores = jax.lax.map(one, (split(places), split(targets)))
  return jax.tree.map(lambda x: x.reshape(-1), scores)


PROGRAMS = (_read, _hidden, _hidden_after, _scores)
"""The compiled functions, one program per batch shape."""


class _Batch(NamedTuple, Generic[_T]):
  """A batch of items, and its padded shape.

  Attributes:
    items: the items in it.
    rows: padded number of rows.
    size: padded number of tokens per row.
  """

  items: list[_T]
  rows: int
  size: int

  def padded(self, items: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The items' tokens, int32 ``[rows, size]``, and lengths ``[rows]``; padding rows have length 1."""
    tokens, lengths = right_pad(items)
    room = self.rows - len(lengths)
    tokens = np.pad(tokens, ((0, room), (0, self.size - tokens.shape[1])))
    return tokens, np.pad(lengths, (0, room), constant_values=1)


class Scorer:
  """Scores continuations given their contexts, computing as few tokens as possible.

  Requests that differ only in their last token are one row; rows with a common prefix (options of a question, questions
  after the same examples) compute the prefix once, and their own tokens against its cache. Batches contain rows of
  similar length, padded to a few sizes: another size needs another program, and must save more time than compiling it
  takes. Logits are computed only where needed, a few hundred positions at a time.

  With several processes, each scores its part of the rows, and all return the same results. A model that spans
  processes is run by all of them together.

  Attributes:
    batch_tokens: tokens per batch, including padding and cached tokens that its rows see; determines memory.
  """

  def __init__(self, model: Transformer, params: Params, *, batch_tokens: int = 4096):
    if batch_tokens < 1:
      raise UserError(f"batch_tokens must be at least 1, not {batch_tokens}")
    self.batch_tokens = batch_tokens
    self._model, self._params = model, as_layers(params, model.plan)
    mesh = mesh_of(self._params)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    rate = _CPU_RATE if platform == "cpu" else _ACCELERATOR_RATE
    # Tokens that could be computed in the time that a program takes to compile.
    self._program = _COMPILE_SECONDS * model.config.num_layers * rate / cost(model.config, model.plan).flops
    # If the rotary embedding depends on a row's length, rows of different lengths cannot share a prefix.
    self._share = not model.config.rope_depends_on_row

  def __call__(
    self,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Progress | None = None,
  ) -> list[Scored]:
    """Scores requests.

    Args:
      requests: context and continuation, each at least one token.
      progress: called with (rows done, total rows) of this process.

    Raises:
      UserError: if a context or a continuation is empty, or a token is not in the vocabulary.
    """
    with where_parameters_are(self._model.config, self._params):
      return self._score(requests, progress)

  def _score(
    self,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    progress: Progress | None,
  ) -> list[Scored]:
    read: list[tuple[np.ndarray, int]] = []
    targets: list[np.ndarray] = []
    for number, (context, continuation) in enumerate(requests):
      if not len(context) or not len(continuation):
        raise UserError(f"request {number} has no {'continuation' if len(context) else 'context'}")
      tokens = np.concatenate([context, continuation]).astype(np.int32)
      if tokens.min() < 0 or tokens.max() >= self._model.config.vocab_size:
        raise UserError(
          f"request {number} has tokens {tokens.min()} to {tokens.max()}; the vocabulary is 0 to "
          f"{self._model.config.vocab_size - 1}"
        )
      read.append((tokens[:-1], len(context) - 1))
      targets.append(tokens[len(context) :])
    check_given("scores", {"requests": (read, targets), "batch_tokens": self.batch_tokens})
    spread = is_multiprocess(self._params)
    rows = rows_of_requests(read, merge=self._share)
    grouped = families(rows) if self._share else [Family((row,), 0) for row in rows]
    scores = np.zeros(len(requests)), np.zeros(len(requests), np.int64)
    with_targets = _Requests([first for _, first in read], targets)
    mine = grouped if spread else part(grouped, jax.process_index(), jax.process_count())
    total, done = sum(len(family.rows) for family in mine), 0
    for numbers, found, count in fetch_each(self._batches(mine, with_targets)):
      _add_up(numbers, found, *scores)
      done += count
      if progress is not None:
        progress(done, total)
    log_likelihoods, hits = scores if spread else together(scores)
    return [
      Scored(float(value), int(hit) == len(target))
      for value, hit, target in zip(log_likelihoods, hits, targets, strict=True)
    ]

  def _batches(self, grouped: Sequence[Family], requests: _Requests) -> Iterator[tuple[list[int], Any, int]]:
    """Yields indices of requests, one for each score; scores, on device; and the number of rows."""
    alone = [row for family in grouped if not family.shared for row in family.rows]
    for batch in self._by_length(alone, lambda row: len(row.tokens)):
      hidden = _hidden(self._model, self._params, *batch.padded([row.tokens for row in batch.items]))
      yield self._scored(hidden, batch.items, np.zeros(len(batch.items), int), requests)
    related = [family for family in grouped if family.shared]
    for beginnings in self._by_length(related, lambda family: family.shared, readers=lambda family: len(family.rows)):
      shared = [family.shared for family in beginnings.items]
      tokens, lengths = beginnings.padded([family.rows[0].tokens[: family.shared] for family in beginnings.items])
      cache = _read(self._model, self._params, tokens, lengths)
      members = [(owner, row) for owner, family in enumerate(beginnings.items) for row in family.rows]
      rest = lambda member: len(member[1].tokens) - shared[member[0]]  # noqa: B023
      for chosen in self._by_length(members, rest, before=beginnings.size):
        rows = [row for _, row in chosen.items]
        starts = np.array([shared[owner] for owner, _ in chosen.items], np.int32)
        own, lengths = chosen.padded([row.tokens[start:] for row, start in zip(rows, starts)])
        fill = lambda x: np.pad(np.asarray(x, np.int32), (0, len(own) - len(x)))  # noqa: B023
        owners = fill([owner for owner, _ in chosen.items])
        visible = ops.Rows(jnp.asarray(lengths + fill(starts)), offset=jnp.asarray(fill(starts)))
        hidden = _hidden_after(self._model, self._params, cache, owners, own, visible)
        yield self._scored(hidden, rows, starts, requests)

  def _by_length(
    self,
    items: Sequence[_T],
    length: Callable[[_T], int],
    before: int = 0,
    readers: Callable[[_T], int] = lambda item: 1,
  ) -> Iterator[_Batch[_T]]:
    """Batches of items of similar lengths, longest first.

    Args:
      items: the items.
      length: number of tokens of an item.
      before: number of cached tokens that each sees.
      readers: number of rows in memory, including padding, that hold an item's tokens.
    """
    items = sorted(items, key=length, reverse=True)
    size, full, left = 0, 0, sum(map(readers, items))
    while items:
      smaller = padded_size(length(items[0]))
      if not size or (size - smaller) * left > self._program:
        size = smaller
      # Each row has a copy of the keys and values before it.
      count = max(1, int(self.batch_tokens / (before + size * max(1.0, (before + size) / _KEYS))))
      while padded_size(count, 1) > count:
        count -= 1
      taken, items = items[:count], items[count:]
      left -= sum(map(readers, taken))
      # The last rows of a size use the previous program, unless they would be mostly padding.
      room = count - len(taken)
      yield _Batch(taken, count if size == full and room * size < self._program else padded_size(len(taken), 1), size)
      full = size

  def _scored(
    self, hidden: jax.Array, rows: Sequence[Row], starts: np.ndarray, requests: _Requests
  ) -> tuple[list[int], Any, int]:
    numbers, places, targets = requests.places(rows, starts, hidden.shape[1])
    fill = lambda x: np.pad(np.asarray(x, np.int32), (0, _padding(len(x))))
    return numbers, _scores(self._model, self._params, hidden, fill(places), fill(targets)), len(rows)


class _Requests(NamedTuple):
  """Where the requests' continuations lie in their rows.

  Attributes:
    firsts: for each request, the position in its row that predicts its first token.
    targets: its tokens.
  """

  firsts: list[int]
  targets: list[np.ndarray]

  def places(self, rows: Sequence[Row], starts: np.ndarray, length: int) -> tuple[list[int], list[int], list[int]]:
    """The targets of rows whose tokens from ``starts`` on are in a batch of ``[B, length]``.

    Returns:
      The request's index, the position among B × length and the token, for each target token.
    """
    numbers: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    for index, (row, start) in enumerate(zip(rows, starts.tolist(), strict=True)):
      for number in row.requests:
        wanted = self.targets[number].tolist()
        begin = index * length + self.firsts[number] - start
        numbers += [number] * len(wanted)
        places += range(begin, begin + len(wanted))
        targets += wanted
    return numbers, places, targets


def _padding(count: int) -> int:
  """The number of padding positions that complete the last chunk."""
  size = padded_size(count)
  return (size if size <= _CHUNK else -(-size // _CHUNK) * _CHUNK) - count


def _add_up(numbers: list[int], found: tuple[np.ndarray, np.ndarray], totals: np.ndarray, hits: np.ndarray) -> None:
  """Adds each token's log-likelihood, and whether it is the most likely, to its request's totals."""
  values, likeliest = (x[: len(numbers)] for x in found)
  np.add.at(totals, numbers, values.astype(np.float64))
  np.add.at(hits, numbers, likeliest.astype(np.int64))


def part(items: Sequence[_T], index: int, count: int) -> Sequence[_T]:
  """The items of process ``index`` of ``count``; every item belongs to exactly one process."""
  return items[index::count]


def together(values: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
  """Sums arrays over processes, each with zeros in the other processes' places; the same result on all."""
  if jax.process_count() == 1:
    return values
  from jax.experimental import multihost_utils

  # As bytes: without x64, a float64 would be gathered as float32.
  gathered = [multihost_utils.process_allgather(np.frombuffer(value.tobytes(), np.uint8)) for value in values]
  return tuple(
    sum(np.frombuffer(each.tobytes(), value.dtype) for each in parts).reshape(value.shape)  # type: ignore[union-attr]
    for value, parts in zip(values, gathered, strict=True)
  )
