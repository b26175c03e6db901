"""Which tokens make a row: long documents cut to the context, short ones packed into rows together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sa_jax.errors import UserError
from sa_jax.train.batch import Batch
from sa_jax.train.data.corpus import Corpus

Packing = Literal["rows", "none"]
TooLong = Literal["error", "cut"]


class Spans(NamedTuple):
  """Attributes:
  bounds: int64 ``[spans, 2]``: first and past-last token of each piece of a document.
  cut: how many samples lost their end.
  barren: how many pieces were left out, because nothing in them is to be learnt.
  continued: bool ``[spans]``, which pieces take up the middle of a document.
  """

  bounds: np.ndarray
  cut: int
  barren: int
  continued: np.ndarray


def spans_of(corpus: Corpus, length: int, too_long: TooLong) -> Spans:
  """Every document as pieces of at most ``length`` tokens, the start tokens before a piece from its middle counted.

  A document that is learnt as a whole goes on in the next piece. A sample, which has a prompt, makes no sense from its
  middle: one that is too long is an error, or keeps its start.

  Raises:
    UserError: if a sample is longer than ``length`` and may not be cut, or nothing is left to learn.
  """
  bounds: list[tuple[int, int]] = []
  cut = 0
  own = length - len(corpus.start)
  if own < 1:
    raise UserError(f"rows of {length} tokens have no room for text after {len(corpus.start)} start tokens")
  for document, (start, stop) in enumerate(zip(corpus.offsets[:-1].tolist(), corpus.offsets[1:].tolist(), strict=True)):
    if stop - start <= length:
      bounds.append((start, stop))
    elif is_sample(corpus.trained[start:stop]):
      if too_long == "error":
        raise UserError(
          f"sample {document} has {stop - start} tokens, the context {length}; `too_long=cut` keeps the starts of "
          "such samples"
        )
      cut += 1
      bounds.append((start, start + length))
    else:
      bounds.append((start, start + length))
      bounds += [(first, min(first + own, stop)) for first in range(start + length, stop, own)]
  begins = frozenset(corpus.offsets.tolist())
  opened = lambda start: bool(corpus.start) and start not in begins
  # Of what a piece begins with nothing is predicted.
  kept = [(start, stop) for start, stop in bounds if corpus.trained[start + (not opened(start)) : stop].any()]
  if not kept:
    raise UserError("there is nothing to train on: no document has two tokens")
  continued = np.asarray([start not in begins for start, _ in kept])
  return Spans(np.asarray(kept, np.int64), cut, len(bounds) - len(kept), continued)


def is_sample(trained: np.ndarray) -> bool:
  """Whether a document with these marks has more that is only read than a start token."""
  return not trained[1:].all()


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Puts pieces into rows, each in turn into the fullest row that has room, or a new one (best fit).

  Args:
    sizes: of each piece, at most ``length``.
    length: of a row.

  Returns:
    The pieces of each row, by number.
  """
  rows: list[list[int]] = []
  with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows, by free slots
  available = 0  # bit f: some row has f free slots
  for piece, size in enumerate(sizes):
    if fitting := available >> size:
      free = size + (fitting & -fitting).bit_length() - 1
      row = with_room[free].pop()
      if not with_room[free]:
        available &= ~(1 << free)
      rows[row].append(piece)
    else:
      free, row = length, len(rows)
      rows.append([piece])
    if left := free - size:
      with_room[left].append(row)
      available |= 1 << left
  return rows


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
  """The rows of a corpus, read one by one.

  Attributes:
    corpus: the tokens.
    length: ``T``.
    spans: pieces of documents.
    members: the spans of each row.
  """

  corpus: Corpus
  length: int
  spans: Spans
  members: list[list[int]]

  def __len__(self) -> int:
    return len(self.members)

  @functools.cached_property
  def has_segments(self) -> bool:
    """Whether a row holds more than one document."""
    return any(len(members) > 1 for members in self.members)

  def read(self, numbers: Sequence[int]) -> Batch:
    """Rows by number, as NumPy arrays; number -1 is a row of padding."""
    shape = (len(numbers), self.length)
    tokens: Any = np.zeros(shape, np.int32)
    segments: Any = np.zeros(shape, np.int32)
    weights: Any = np.zeros(shape, np.float32)
    for index, number in enumerate(numbers):
      at = 0
      for segment, member in enumerate(self.members[number] if number >= 0 else (), 1):
        start, stop = self.spans.bounds[member]
        opening = self.corpus.start if self.spans.continued[member] else ()
        own = at + len(opening)
        place = slice(own, own + int(stop - start))
        tokens[index, at:own] = opening
        tokens[index, place] = self.corpus.tokens[start:stop]
        weights[index, place] = self.corpus.trained[start:stop]
        weights[index, at] = 0
        segments[index, at : place.stop] = segment
        at = place.stop
    return Batch(tokens, weights, segments if self.has_segments else None)


def make_rows(corpus: Corpus, length: int, packing: Packing = "rows", too_long: TooLong = "error") -> PackedRows:
  """The rows of a corpus.

  Args:
    corpus: the tokens.
    length: tokens a row, ``T``.
    packing: ``rows`` packs documents together, told apart by segments; ``none`` gives each piece a row of its own,
      which kernels without segments need.
    too_long: what becomes of samples longer than a row; see `spans_of`.

  Raises:
    UserError: as `spans_of`.
  """
  spans = spans_of(corpus, length, too_long)
  sizes = (spans.bounds[:, 1] - spans.bounds[:, 0] + len(corpus.start) * spans.continued).tolist()
  members = pack(sizes, length) if packing == "rows" else [[piece] for piece in range(len(sizes))]
  return PackedRows(corpus, length, spans, members)
