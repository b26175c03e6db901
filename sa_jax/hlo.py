"""Reading collectives off a compiled program's text."""

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
    kind: as HLO names it. Where the TPU compiler has handed one over to the network between slices, such as
      ``all-reduce between slices``.
    count: how many a device takes part in, those in loops counted once an iteration.
    bytes: their arrays on one device: what is gathered, reduced or sent; of a reduce-scatter what is left after it,
      or, where the TPU compiler made it of an all-reduce, what was there before.
  """

  kind: str
  count: int
  bytes: int


def collectives(text: str, slice_size: int | None = None) -> tuple[Collective, ...]:
  """The collectives of a compiled program, by kind.

  Three disguises of the TPU compiler are seen through: a reduce-scatter is an all-reduce inside a fusion of that name,
  an asynchronous collective is spread over several fusions, whose parts share a channel, and what joins devices of
  several slices is sent to the host and comes back from there.

  Args:
    text: HLO after optimisation, ``compiled.as_text()``.
    slice_size: count those only that join devices of different slices, each of so many devices in the mesh's order.
  """
  computations = _computations(text)
  callers = {callee: name for name, lines in computations.items() for callee in _callees(lines)}
  loops = dict(_loops(computations))

  def times(name: str) -> int:
    """How often a computation runs."""
    repeats = loops.get(name, 1)
    return repeats * times(callers[name]) if name in callers else repeats

  def scope(name: str) -> str:
    """The loop's body, or the whole program, that a computation is part of."""
    return name if name in loops or name not in callers else scope(callers[name])

  found: dict[tuple[str, str], tuple[str, int, int]] = {}
  for name, lines in computations.items():
    for line in lines:
      if match := _BETWEEN_SLICES.search(line):
        instruction, shape, transfer = match.groups()
        sent = _ARRAY.search(shape)  # beside a context word and a token
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
  """Whether a collective joins devices of different slices."""
  if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
    groups = [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
  elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    shape, dims, order = ([int(number) for number in part.split(",")] if part else None for part in iota.groups())
    devices = np.arange(math.prod(dims or ())).reshape(dims)
    groups = (devices if order is None else devices.transpose(order)).reshape(shape).tolist()
  else:
    return True  # of all devices
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
  """Each loop's body and how often it runs: what its condition compares a counter, which starts at 0, with."""
  for lines in computations.values():
    for line in lines:
      if match := _WHILE.search(line):
        limits = [int(limit) for text in computations[match[1]] for limit in _LIMIT.findall(text)]
        yield match[2], max(limits, default=1)


def _bytes(shape: str, is_start: bool) -> int:
  """Bytes of an array or of a tuple of arrays; of an asynchronous start's operands and results, the results."""
  sizes = []
  for kind, bits, dims, pred, pred_dims in _ARRAY.findall(shape):
    count = math.prod(int(dim) for dim in (dims or pred_dims).split(",") if dim)
    width = 8 if pred else int(bits)
    if not (is_start and kind in "us" and not dims):  # A context word of the runtime.
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
