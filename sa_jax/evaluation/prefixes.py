"""Finds rows with common prefixes, so that each prefix is computed once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

_WORTH = 0.25
"""A shared prefix is computed separately if that saves at least this fraction of the tokens."""


@dataclasses.dataclass(frozen=True)
class Row:
  """Tokens for the model to read.

  Attributes:
    tokens: int32 ``[T]``.
    first: the first position whose logits are needed; the shared prefix ends before it.
    requests: the indices of the requests that need them.
  """

  tokens: np.ndarray
  first: int
  requests: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Family:
  """Rows with a common prefix.

  Attributes:
    rows: its members.
    shared: length of the prefix in tokens; 0 if each row is computed alone.
  """

  rows: tuple[Row, ...]
  shared: int


def padded_size(size: int, smallest: int = 16) -> int:
  """The padded size, to limit the number of compiled programs: a power of two, or 1.5 times one."""
  if size <= smallest:
    return smallest
  power = 1 << (size - 1).bit_length()
  return 3 * power // 4 if size <= 3 * power // 4 else power


def rows_of_requests(requests: Sequence[tuple[np.ndarray, int]], merge: bool = True) -> list[Row]:
  """The rows to compute, in lexicographic order: duplicates once, and none that is a prefix of another.

  Args:
    requests: int32 tokens ``[T]``, at least one, and the first position whose logits are needed.
    merge: whether a longer row may serve a request for its prefix.
  """
  # Big-endian bytes have the same order as their tokens, and compare fast.
  found: dict[bytes, Row] = {}
  for number, (tokens, first) in enumerate(requests):
    key = tokens.astype(">i4").tobytes()
    old = found.get(key)
    found[key] = _joined(Row(tokens, first, (number,)), old) if old else Row(tokens, first, (number,))
  rows: list[Row] = []
  for key in sorted(found, reverse=True):
    row = found[key]
    if merge and rows and _common(row.tokens, rows[-1].tokens) == len(row.tokens):
      rows[-1] = _joined(rows[-1], row)
    else:
      rows.append(row)
  return rows[::-1]


def _joined(row: Row, other: Row) -> Row:
  return Row(row.tokens, min(row.first, other.first), other.requests + row.requests)


def _common(left: np.ndarray, right: np.ndarray) -> int:
  """The length of the common prefix of two rows."""
  length = min(len(left), len(right))
  differ = np.flatnonzero(left[:length] != right[:length])
  return int(differ[0]) if len(differ) else length


def families(rows: Sequence[Row]) -> list[Family]:
  """Groups sorted rows so that sharing prefixes saves the most tokens."""
  if not rows:
    return []
  common = np.array([_common(left.tokens, right.tokens) for left, right in itertools.pairwise(rows)], np.int64)
  # Split at buckets of prefix length; there are few, so the recursion is shallow.
  levels = np.array([padded_size(length + 1, 1) for length in common.tolist()], np.int64)

  def best(low: int, high: int) -> tuple[int, list[Family]]:
    """The number of tokens that the best grouping of some rows saves, and the grouping."""
    members = tuple(rows[low:high])
    alone = [Family((row,), 0) for row in members]
    if high - low == 1:
      return 0, alone
    inside = levels[low : high - 1]
    parts = [low, *(low + 1 + np.flatnonzero(inside == inside.min())).tolist(), high]
    if len(parts) == high - low + 1:
      saved, apart = 0, alone
    else:
      below = [best(*part) for part in itertools.pairwise(parts)]
      saved, apart = sum(count for count, _ in below), [family for _, group in below for family in group]
    shared = min(int(common[low : high - 1].min()), *(row.first for row in members))
    together = shared * (high - low - 1)
    worth = together >= _WORTH * sum(len(row.tokens) for row in members)
    return (together, [Family(members, shared)]) if worth and together > saved else (saved, apart)

  return best(0, len(rows))[1]
