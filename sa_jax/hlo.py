"""Parsing collectives from the HLO text of a compiled program."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"%([\w.\-]+) = (.*?) (" + "|".join(KINDS) + r")(-start)?\(")
_BETWEEN_SLICES = re.compile(r"%([\w.\-]+) = (.*?) send\(.*_xla_megascale_transfer_type=\"(\w+)\"")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")
_MANY_CALLS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]+)(\d+)\w*\[([\d,]*)\]|(pred)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
  """The collectives of one kind in one execution of a program.

  Attributes:
    kind: HLO's name. For transfers between TPU slices, it ends in ``between slices``.
    count: number per device, with those in loops counted once per iteration.
    bytes: size of their arrays on one device: the gathered, reduced or sent array. For a reduce-scatter, the output; if
      the TPU compiler implements it as a fused all-reduce, the input.
  """

  kind: str
  count: int
  bytes: int


def collectives(text: str, slice_size: int | None = None) -> tuple[Collective, ...]:
  """The collectives of a compiled program, by kind.

  It handles three rewrites of the TPU compiler: a reduce-scatter can be an all-reduce in a fusion of that name, an
  asynchronous collective can be spread over several fusions with the same channel id, and a collective across slices
  becomes a transfer through the host.

  Args:
    text: optimised HLO, from ``compiled.as_text()``.
    slice_size: if given, count only collectives between slices of this many consecutive devices of the mesh.
  """
  computations = _computations(text)
  callers = {callee: name for name, lines in computations.items() for callee in _callees(lines)}
  loops = dict(_loops(computations))

  def times(name: str) -> int:
    """The number of times that a computation runs."""
    repeats = loops.get(name, 1)
    return repeats * times(callers[name]) if name in callers else repeats

  def scope(name: str) -> str:
    """The enclosing loop body of a computation, or the entry computation."""
    return name if name in loops or name not in callers else scope(callers[name])

  found: dict[tuple[str, str], tuple[str, int, int]] = {}
  for name, lines in computations.items():
    for line in lines:
      if match := _BETWEEN_SLICES.search(line):
        instruction, shape, transfer = match.groups()
        sent = _ARRAY.search(shape)  # the first element of a tuple with a context word and a token
        kind = f"{transfer.lower().replace('_', '-')} between slices"
        found[name, instruction] = (kind, times(name), _bytes(sent[0] if sent else "", is_start=False))
      elif (match := _OPERATION.search(line)) and (slice_size is None or _crosses(line, slice_size)):
        instruction, shape, kind, start = match.groups()
        channel = _CHANNEL.search(line)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
          kind = "reduce-scatter"
        key = (scope(name), channel[1] if channel else instruction)
        found[key] = (kind, times(name), _bytes(shape, is_start=start is not None and kind != "all-reduce"))
  return tuple(
    Collective(
      kind,
      sum(count for other, count, _ in found.values() if other == kind),
      sum(count * size for other, count, size in found.values() if other == kind),
    )
    for kind in dict.fromkeys((*KINDS, *sorted(kind for kind, _, _ in found.values())))
    if any(other == kind for other, _, _ in found.values())
  )


def _crosses(line: str, slice_size: int) -> bool:
  """Whether a collective involves devices of different slices."""
  if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
    groups = [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
  elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    shape, dims, order = ([int(number) for number in part.split(",")] if part else None for part in iota.groups())
    devices = np.arange(math.prod(dims or ())).reshape(dims)
    groups = (devices if order is None else devices.transpose(order)).reshape(shape).tolist()
  else:
    return True  # no groups: all devices
  return any(len({device // slice_size for device in group}) > 1 for group in groups)


def _computations(text: str) -> dict[str, list[str]]:
  """The lines of each computation."""
  computations: dict[str, list[str]] = {}
  current: list[str] = []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[2], [])
    else:
      current.append(line)
  return computations


def _callees(lines: Iterable[str]) -> Iterable[str]:
  for line in lines:
    yield from _CALLS.findall(line)
    for names in _MANY_CALLS.findall(line):
      yield from (name.strip().lstrip("%") for name in names.split(","))


def _loops(computations: Mapping[str, list[str]]) -> Iterable[tuple[str, int]]:
  """Each loop's body and its trip count: the constant in its condition, assuming a counter that starts at 0."""
  for lines in computations.values():
    for line in lines:
      if match := _WHILE.search(line):
        limits = [int(limit) for text in computations[match[1]] for limit in _LIMIT.findall(text)]
        yield match[2], max(limits, default=1)


def _bytes(shape: str, is_start: bool) -> int:
  """Bytes of an array or a tuple of arrays; for an asynchronous start, of the results without the operands."""
  sizes = []
  for kind, bits, dims, pred, pred_dims in _ARRAY.findall(shape):
    count = math.prod(int(dim) for dim in (dims or pred_dims).split(",") if dim)
    width = 8 if pred else int(bits)
    if not (is_start and kind in "us" and not dims):  # a context word of the runtime
      sizes.append(count * width // 8)
  return sum(sizes[len(sizes) // 2 :]) if is_start else sum(sizes)


def added(found: Sequence[tuple[Collective, ...]]) -> tuple[Collective, ...]:
  """The collectives of several programs, each run once."""
  each = [collective for one in found for collective in one]
  same = lambda kind: [collective for collective in each if collective.kind == kind]
  return tuple(
    Collective(kind, sum(one.count for one in same(kind)), sum(one.bytes for one in same(kind)))
    for kind in dict.fromkeys(one.kind for one in each)
  )
