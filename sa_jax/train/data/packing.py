"""Makes rows of tokens: cuts long documents to the context length, and packs short ones together."""

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
  """The pieces that documents are cut into.

  Attributes:
    bounds: int64 ``[spans, 2]``: first and past-last token of each piece of a document.
    cut: number of samples that were truncated.
    barren: number of pieces left out because they have no token to train on.
    continued: bool ``[spans]``, whether a piece starts in the middle of a document.
  """

  bounds: np.ndarray
  cut: int
  barren: int
  continued: np.ndarray


def spans_of(corpus: Corpus, length: int, too_long: TooLong) -> Spans:
  """Splits documents into pieces of at most ``length`` tokens, including start tokens of continued pieces.

  A document that is trained on entirely continues in the next piece. A sample, which has a prompt, cannot start in the
  middle: if it is too long, it is an error, or truncated.

  Raises:
    UserError: if a sample is longer than ``length`` and may not be truncated, or no tokens to train on remain.
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
  # A piece's first token is not predicted, unless start tokens are put before it.
  kept = [(start, stop) for start, stop in bounds if corpus.trained[start + (not opened(start)) : stop].any()]
  if not kept:
    raise UserError("there is nothing to train on: no document has two tokens")
  continued = np.asarray([start not in begins for start, _ in kept])
  return Spans(np.asarray(kept, np.int64), cut, len(bounds) - len(kept), continued)


def is_sample(trained: np.ndarray) -> bool:
  """Whether a document has untrained tokens besides its first."""
  return not trained[1:].all()


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Puts pieces into rows: each goes into the fullest row with enough room, or a new one (best fit).

  Args:
    sizes: tokens per piece, at most ``length``.
    length: tokens per row.

  Returns:
    The indices of each row's pieces.
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
  """The rows of a corpus, read on demand.

  Attributes:
    corpus: the tokens.
    length: ``T``.
    spans: the pieces of documents.
    members: the indices of each row's spans.
  """

  corpus: Corpus
  length: int
  spans: Spans
  members: list[list[int]]

  def __len__(self) -> int:
    return len(self.members)

  @functools.cached_property
  def has_segments(self) -> bool:
    """Whether some row holds more than one document."""
    return any(len(members) > 1 for members in self.members)

  def read(self, numbers: Sequence[int]) -> Batch:
    """Rows by index, as NumPy arrays; index -1 is a row of padding."""
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
    length: tokens per row, ``T``.
    packing: ``rows`` packs documents together, separated by segments; ``none`` puts each piece in its own row, for
      kernels without segments.
    too_long: what to do with samples longer than a row; see `spans_of`.

  Raises:
    UserError: see `spans_of`.
  """
  spans = spans_of(corpus, length, too_long)
  sizes = (spans.bounds[:, 1] - spans.bounds[:, 0] + len(corpus.start) * spans.continued).tolist()
  members = pack(sizes, length) if packing == "rows" else [[piece] for piece in range(len(sizes))]
  return PackedRows(corpus, length, spans, members)
