"""Streaming data: rows are made during training from any source of examples: grain, Hugging Face, any iterable.

An example is a text, an object as in a ``.jsonl`` line, or ``{"tokens": [...]}``, optionally with ``"trained"`` if not
every token is trained on.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from sa_jax.errors import UserError
from sa_jax.formats import Tokenizer
from sa_jax.train.batch import Batch
from sa_jax.train.data.corpus import Corpus, Reading, encoded
from sa_jax.train.data.packing import PackedRows, Packing, TooLong, make_rows
from sa_jax.train.data.pipeline import grain_package
from sa_jax.train.data.sources import Document, Piece, Report, documents_of

Example = str | Mapping[str, object]
_AT_ONCE = 64


class RandomAccess(Protocol):
  """Examples by index, like grain sources and lists."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


Examples = Iterable[Example] | RandomAccess
"""A source: any iterable, or random access by index."""


@dataclasses.dataclass(frozen=True)
class Part:
  """Which examples a host reads: every ``count``-th, starting at ``index``."""

  index: int = 0
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of batches and rows.

  Attributes:
    rows: rows per batch on this host.
    length: tokens per row.
    packing: see `make_rows`.
    too_long: see `make_rows`.
    vocabulary: the model's vocabulary size.
    learn_all: whether prompts are trained on too.
  """

  rows: int
  length: int
  packing: Packing = "rows"
  too_long: TooLong = "error"
  vocabulary: int = 1 << 31
  learn_all: bool = False


class Encoded(NamedTuple):
  """A document: uint32 tokens, and bool, whether each is trained on."""

  tokens: np.ndarray
  trained: np.ndarray


class Cursor:
  """An endless iterator over examples, with a position.

  Random-access sources are reshuffled each epoch. An iterable is restarted each epoch; its own position is used if it
  has one (``state_dict`` of Hugging Face's, ``get_state`` of grain's iterators). Otherwise, to resume, the examples
  seen are read again and dropped. An iterator has only one epoch.
  """

  def __init__(self, source: Examples, seed: int, part: Part) -> None:
    """Creates a cursor at the start; see `Stream`."""
    self._source: Any = source
    self._part = part
    self._by_number = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if self._by_number:
      grain = grain_package()
      examples = source if isinstance(source, grain.MapDataset) else grain.MapDataset.source(source)
      if len(examples) < part.count:
        raise UserError(f"the source has {len(examples)} examples, but there are {part.count} hosts")
      mine = examples[part.index :: part.count]
      self._source = mine.shuffle(seed=seed % (1 << 32)).repeat((1 << 60) // len(mine)).to_iter_dataset()
    self._epoch = self._seen = 0
    self._iterator: Any = iter(self._source)

  def __next__(self) -> Example:
    if self._by_number:
      self._seen += 1
      return next(self._iterator)
    for _ in range(2):
      for example in self._iterator:
        self._seen += 1
        if (self._seen - 1) % self._part.count == self._part.index:
          return example
      if not self._seen or self._iterator is self._source:
        break
      self._begin(self._epoch + 1)
    seen = f"has ended after {self._seen} examples" if self._seen else "has no example"
    raise UserError(f"the source {seen}, before the last step")

  def _begin(self, epoch: int) -> None:
    self._epoch, self._seen = epoch, 0
    self._iterator = iter(self._source)

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON values."""
    own = next((at for at in (self._iterator, self._source) for name in _STATES if hasattr(at, name)), None)
    inner = None if own is None else next(getattr(own, name)() for name in _STATES if hasattr(own, name))
    return {"epoch": self._epoch, "seen": self._seen, "inner": inner}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Moves to a position."""
    inner = state["inner"]
    if state["epoch"]:
      self._begin(state["epoch"])
    self._seen = state["seen"]
    if inner is None:
      for _ in itertools.islice(self._iterator, self._seen):
        pass
    elif hasattr(self._iterator, "set_state"):
      self._iterator.set_state(inner)
    else:
      self._source.load_state_dict(inner)
      self._iterator = iter(self._source)


_STATES = ("get_state", "state_dict")


class Stream:
  """Batches of this host's rows, each made while the previous one is computed; the state includes leftover documents.

  Documents are packed as in `make_rows`: those of a batch together with the leftovers of the previous one.
  """

  def __init__(self, examples: Cursor, tokenizer: Tokenizer, shape: Shape, reading: Reading = Reading()) -> None:
    """Starts to read.

    Args:
      examples: the examples.
      tokenizer: the model's.
      shape: of batches and rows.
      reading: the text key, the start token, and whether to skip bad examples.
    """
    self._examples, self._tokenizer, self._shape, self._reading = examples, tokenizer, shape, reading
    self._start = tokenizer.opening(reading.start_token)
    self.report = Report()
    self._held: list[Encoded] = []
    self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="rows")
    self._state: tuple[dict[str, Any], list[Encoded]] = examples.get_state(), []
    self._next: concurrent.futures.Future[tuple[Batch, tuple[dict[str, Any], list[Encoded]]]] | None = None

  def __next__(self) -> Batch:
    coming = self._next or self._worker.submit(self._make)
    batch, self._state = coming.result()
    self._next = self._worker.submit(self._make)
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch returned, as JSON values."""
    at, held = self._state
    return {"examples": at, "held": [[each.tokens.tolist(), each.trained.astype(int).tolist()] for each in held]}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to a position."""
    if self._next is not None:
      self._next.result()
    self._examples.set_state(state["examples"])
    self._held = [Encoded(np.asarray(ids, np.uint32), np.asarray(mask, np.bool_)) for ids, mask in state["held"]]
    self._state, self._next = (state["examples"], self._held), None

  def _make(self) -> tuple[Batch, tuple[dict[str, Any], list[Encoded]]]:
    """The next batch, and the position after it."""
    shape, held = self._shape, self._held
    # Two batches' worth, so that later documents can fill the first rows.
    while sum(len(each.tokens) for each in held) < 2 * shape.rows * shape.length:
      held = held + self._more()
    offsets = np.cumsum([0, *(len(each.tokens) for each in held)], dtype=np.int64)
    tokens, trained = (np.concatenate(column) for column in zip(*held, strict=True))
    if (largest := int(tokens.max())) >= shape.vocabulary:
      raise UserError(f"the source has token {largest}, but the model's vocabulary has {shape.vocabulary} tokens")
    corpus = Corpus(tokens, trained, offsets, self.report, tuple(self._start))
    rows = make_rows(corpus, shape.length, shape.packing, shape.too_long)
    # The oldest document is in the first row, so none is delayed forever.
    batch = rows.read([row if row < len(rows) else -1 for row in range(shape.rows)])
    if batch.segments is None and shape.packing == "rows":
      # Always pass segments, so that one program serves all batches.
      batch = dataclasses.replace(batch, segments=(np.cumsum(batch.weights[:, ::-1], 1)[:, ::-1] > 0).astype(np.int32))
    left = sorted(piece for row in rows.members[shape.rows :] for piece in row)
    self._held = [self._piece(rows, piece) for piece in left]
    return batch, (self._examples.get_state(), self._held)

  def _piece(self, rows: PackedRows, piece: int) -> Encoded:
    """A piece as a document of the next batch, which begins as a row does."""
    part = slice(*rows.spans.bounds[piece])
    tokens, trained = rows.corpus.tokens[part], rows.corpus.trained[part]
    if not rows.spans.continued[piece]:
      return Encoded(tokens, trained)
    start = np.asarray(rows.corpus.start, tokens.dtype)
    return Encoded(np.concatenate([start, tokens]), np.concatenate([np.zeros(start.shape, np.bool_), trained]))

  def _more(self) -> list[Encoded]:
    """The documents of the next examples."""
    found: list[Encoded] = []
    documents: list[Document] = []
    for _ in range(_AT_ONCE):
      example = next(self._examples)
      try:
        if isinstance(example, Mapping) and "tokens" in example:
          found.append(_of_tokens(example))
        elif isinstance(example, str):
          documents.append(Document((Piece(example, True),)))
        else:
          documents += documents_of(dict(example), self._tokenizer, self._reading.text_key)
      except (ValueError, TypeError) as error:
        if not self._reading.skip_bad:
          raise UserError(f"example {self._examples.get_state()['seen']} of the source: {error}") from None
        self.report.bad += 1
    found += [Encoded(*each) for each in encoded(documents, self._tokenizer, self._start)]
    self.report.documents += len(found)
    if self._shape.learn_all:
      found = [Encoded(each.tokens, np.ones_like(each.trained)) for each in found]
    return [each for each in found if len(each.tokens)]


def _of_tokens(example: Mapping[str, object]) -> Encoded:
  tokens: np.ndarray = np.asarray(example["tokens"])
  trained = np.asarray(example.get("trained", np.ones(tokens.shape)), np.bool_)
  if tokens.ndim != 1 or tokens.shape != trained.shape or not np.issubdtype(tokens.dtype, np.integer):
    raise UserError(f"'tokens' and 'trained' must be lists of the same length, not {tokens.shape} and {trained.shape}")
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < 1 << 31:
    raise UserError("'tokens' has numbers that are not token ids")
  return Encoded(tokens.astype(np.uint32), trained)


def hub_dataset(name: str, subset: str | None, split: str, part: Part) -> Examples:
  """Streams this host's part of a Hugging Face dataset, or of a folder in that format.

  Raises:
    UserError: if datasets is not installed, or does not find the dataset.
  """
  try:
    datasets = importlib.import_module("datasets")
    nodes = importlib.import_module("datasets.distributed")
  except ImportError as error:
    raise UserError(f"a dataset is read with datasets ({error}): pip install 'sa-jax[data]'") from None
  try:
    found = datasets.load_dataset(name, subset, split=split, streaming=True)
  except Exception as error:  # datasets raises many types: unknown name, split or subset, no network
    raise UserError(f"the dataset {name} cannot be read: {str(error).strip().splitlines()[0]}") from None
  split_up: Examples = nodes.split_dataset_by_node(found, part.index, part.count) if part.count > 1 else found
  return split_up


class Gathered:
  """A stream of this host, whose saved position covers all hosts."""

  def __init__(self, stream: Stream, part: Part, gather: Callable[[dict[str, Any]], Sequence[dict[str, Any]]]) -> None:
    """Wraps a stream.

    Args:
      stream: this host's stream.
      part: the part of the examples that it reads.
      gather: gathers a value from all hosts.
    """
    self._stream, self._part, self._gather = stream, part, gather

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._stream)

  def get_state(self) -> dict[str, Any]:
    """The positions, by part."""
    mine = {"part": self._part.index, "state": self._stream.get_state()}
    return {"parts": {str(each["part"]): each["state"] for each in self._gather(mine)}}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to this host's position.

    Raises:
      UserError: if the examples were split over a different number of hosts.
    """
    parts = state.get("parts", {})
    if len(parts) != self._part.count:
      raise UserError(f"the source was read in {len(parts)} parts, and cannot continue in {self._part.count}")
    self._stream.set_state(parts[str(self._part.index)])
