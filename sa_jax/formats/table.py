"""Maps a model's checkpoint tensors to parameters, from its family's table."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import einops
import numpy as np

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.formats.families import FAMILIES
from sa_jax.formats.family import Rule
from sa_jax.params import ANCHOR_ONLY
from sa_jax.plan import SharingPlan

_ANCHOR_ONLY = re.compile(rf"layers/\d+/attention/({'|'.join(ANCHOR_ONLY)})(/|$)")
_UNNEEDED = {
  r"(.*\.)?rotary_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached)": "recomputed from rope_theta",
  r"(model\.)?(visual|vision_\w+|vit|audio_\w+|mm_projector|multi_modal_projector|mlp1|embed_vision)\..*": (
    "of another part than the language model"
  ),
  r"(model\.)?(value_head|v_head|score)\..*": "a head of another task",
}

Index = tuple[slice, ...]
Shape = tuple[int, ...]

_LISTED = 200  # maximum lines of an error message


class Entry(NamedTuple):
  """A parameter, and the checkpoint tensor, or the part of one, that it comes from.

  Attributes:
    key: the checkpoint's name.
    path: our path, in the layer layout.
    axes: einops pattern from the part's axes to ours.
    shape: shape of the whole checkpoint tensor; if that holds all experts, the shape per expert.
    view: einops pattern that brings the parts to the first axis; empty for none.
    part: start and end of the part along that axis, and the size of the axis.
    sizes: sizes of the letters.
    expert: index along the parameter's axis of experts, and their number; None for all.
    stacked: whether the checkpoint tensor holds all experts, along its first axis.
  """

  key: str
  path: tuple[str, ...]
  axes: str
  shape: tuple[int, ...]
  view: str
  part: tuple[int, int, int]
  sizes: dict[str, int]
  expert: tuple[int, int] | None = None
  stacked: bool = False

  @property
  def stored_shape(self) -> tuple[int, ...]:
    """The shape of the checkpoint tensor, with all experts that it holds."""
    return (self.expert[1], *self.shape) if self.stacked and self.expert else self.shape

  def to_ours(self, tensor: np.ndarray) -> np.ndarray:
    """Converts the checkpoint tensor to our parameter: a view if strides allow."""
    if self.view:
      tensor = _rearrange(tensor, self.view, self.sizes | {"P": self.part[2]})
    return _rearrange(tensor[self.part[0] : self.part[1]], self.axes, self.sizes)

  def part_of(self, tensor: np.ndarray, index: Index | None) -> np.ndarray:
    """`to_ours`, or a slice of it."""
    ours = self.to_ours(tensor)
    return ours if index is None else ours[index]

  def rows_of(self, index: Index | None) -> slice | None:
    """The slice of the checkpoint tensor's first axis that covers a slice of our parameter; None for all of it."""
    if index is None or len(self.shape) < 1:
      return None
    numbers = np.arange(self.shape[0], dtype=np.int32).reshape(-1, *[1] * (len(self.shape) - 1))
    part = self.part_of(np.broadcast_to(numbers, self.shape), index)
    # Indices only grow along our axes.
    return slice(int(part[(0,) * part.ndim]), int(part[(-1,) * part.ndim]) + 1)

  def to_theirs(self, parameter: np.ndarray) -> np.ndarray:
    """Converts our parameter to the checkpoint tensor, or its part of one (see `pack`); the inverse of `to_ours`."""
    return _rearrange(parameter, _inverse(self.axes), self.sizes)

  def is_dropped(self, plan: SharingPlan) -> bool:
    """Whether this is a follower's parameter that followers lack."""
    return bool(_ANCHOR_ONLY.match("/".join(self.path))) and not plan.is_anchor(int(self.path[1]))

  def under(self, plan: SharingPlan) -> Entry:
    """The entry; for a follower's packed tensor, which has no queries and keys, the entry of its values."""
    start, end, whole = self.part
    if self.path[2:3] != ("attention",) or end - start == whole or plan.is_anchor(int(self.path[1])):
      return self
    sizes = self.sizes | {"P": end - start}
    shape = _extents(self.view.split(" -> ")[0], sizes) if self.view else (end - start, *self.shape[1:])
    return self._replace(shape=shape, part=(0, end - start, end - start))

  def our_shape(self) -> tuple[int, ...]:
    """The parameter's shape, or its shape per expert."""
    return self.to_ours(np.broadcast_to(np.zeros((), np.bool_), self.shape)).shape


def pack(parts: Sequence[tuple[Entry, np.ndarray]]) -> np.ndarray:
  """The checkpoint tensor from its parameters, all of them and in order."""
  if parts[0][0].stacked:
    by_expert = itertools.groupby(parts, key=lambda part: part[0].expert)
    return np.stack([pack([(entry._replace(stacked=False), each) for entry, each in own]) for _, own in by_expert])
  pieces = [entry.to_theirs(parameter) for entry, parameter in parts]
  tensor = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
  first = parts[0][0]
  return _rearrange(tensor, _inverse(first.view), first.sizes | {"P": first.part[2]}) if first.view else tensor


def _inverse(pattern: str) -> str:
  before, after = pattern.split(" -> ")
  return f"{after} -> {before}"


def _rearrange(tensor: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
  return einops.rearrange(tensor, pattern, **{letter: sizes[letter] for letter in set(re.findall(r"[A-Z]", pattern))})


def _extents(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
  """The shape of one side of a pattern."""
  return tuple(
    math.prod(sizes[letter] for letter in re.findall(r"[A-Z]", axis)) for axis in re.findall(r"\([^)]*\)|\w", axes)
  )


def entries(config: ModelConfig, table: tuple[Rule, ...] | None = None) -> Iterator[Entry]:
  """Every parameter of a dense model of this config, in the order of its family's table, or of an alternative table."""
  sizes = {
    "V": config.vocab_size,
    "D": config.embed_dim,
    "N": config.num_heads,
    "K": config.num_kv_heads,
    "G": config.num_heads // config.num_kv_heads,
    "H": config.head_dim,
    "R": config.value_width,
    "F": config.mlp_dim,
    "X": config.experts.count if config.experts else 0,
    "S": config.experts.shared_width if config.experts else 0,
  }
  for rule in table or FAMILIES[config.family].table:
    if any(bool(_field(config, field.lstrip("!"))) == field.startswith("!") for field in rule.when.split()):
      continue
    lengths = [_extents(axes.split(" -> ")[0], sizes)[0] for _, axes in rule.parts]
    whole = sum(lengths)
    if rule.view:
      shape = _extents(rule.view.split(" -> ")[0], sizes | {"P": whole})
    else:
      shape = (whole, *_extents(rule.parts[0][1].split(" -> ")[0], sizes)[1:])
    starts = itertools.accumulate(lengths, initial=0)
    parts = [
      (path, axes, (start, start + length, whole)) for (path, axes), start, length in zip(rule.parts, starts, lengths)
    ]
    layers = range(config.num_layers) if "{layer}" in rule.key else (0,)
    experts = (
      [(number, sizes["X"]) for number in range(sizes["X"])] if rule.stacked or "{expert}" in rule.key else [None]
    )
    for layer, expert in itertools.product(layers, experts):
      key = rule.key.format(layer=layer, expert=expert and expert[0])
      for path, axes, part in parts:
        ours = tuple(path.format(layer=layer).split("/"))
        yield Entry(key, ours, axes, shape, rule.view, part, sizes, expert, rule.stacked)


def _field(config: ModelConfig, name: str) -> object:
  """A field of the config, or of its experts, as ``experts.name``."""
  outer, _, inner = name.partition(".")
  value = getattr(config, outer)
  return getattr(value, inner) if inner and value is not None else value


class Account(NamedTuple):
  """The use of every tensor of a checkpoint.

  Attributes:
    used: entries that become parameters.
    dropped: names of unneeded tensors, or parts of packed ones, with the reasons.
  """

  used: tuple[Entry, ...]
  dropped: dict[str, str]


def head_keys(config: ModelConfig) -> list[str]:
  """The names of an output head that is not tied to the embedding."""
  return [rule.key for rule in FAMILIES[config.family].table if rule.when == "!tie_embeddings"]


def _unneeded(key: str, config: ModelConfig) -> str | None:
  """Why a tensor without a row in the table is not needed, or None if it is unknown."""
  if key in head_keys(config) and config.tie_embeddings:
    return "the output head is tied to the embedding"
  for pattern, reason in {**_UNNEEDED, **FAMILIES[config.family].dropped}.items():
    if re.fullmatch(pattern, key):
      return reason
  return None


def account(
  shapes: Mapping[str, Shape],
  config: ModelConfig,
  plan: SharingPlan,
  where: Path,
  named: Iterable[Entry] | None = None,
) -> Account:
  """Matches a checkpoint's tensors with those that the planned model needs.

  Args:
    shapes: name → shape of every tensor in the checkpoint.
    config: the model; its family determines the table.
    plan: decides which queries and keys are dropped.
    where: the checkpoint, for messages.
    named: a dense model's parameters, if the checkpoint does not have the family's names.

  Raises:
    UserError: lists every tensor that is missing, unknown, or has the wrong shape.
  """
  used: list[Entry] = []
  needed: dict[str, Shape] = {}
  optional: dict[str, Shape] = {}
  dropped: dict[str, str] = {}
  for entry in _of_family(shapes, config) if named is None else named:
    found = shapes.get(entry.key)
    if entry.is_dropped(plan):
      optional[entry.key] = entry.stored_shape
      if found == entry.stored_shape:
        layer = int(entry.path[1])
        packed = entry.part[1] - entry.part[0] < entry.part[2]
        name = f"{entry.key}[{entry.path[-2]}]" if packed else entry.key
        dropped[name] = f"layer {layer} follows layer {plan.source[layer]}"
    else:
      alone = entry.under(plan)
      used.append(alone if found == alone.stored_shape else entry)
      needed[entry.key] = used[-1].stored_shape
  others = [key for key in shapes if key not in needed and key not in optional]
  unneeded = {key: reason for key in others if (reason := _unneeded(key, config))}
  if faults := differences({key: shapes[key] for key in shapes if key not in unneeded}, needed, optional):
    listed = faults[:_LISTED] + ([f"… and {len(faults) - _LISTED} more"] if len(faults) > _LISTED else [])
    raise UserError(f"{where} does not hold the model that its config describes:\n  " + "\n  ".join(listed))
  return Account(tuple(used), dropped | unneeded)


def _of_family(shapes: Mapping[str, Shape], config: ModelConfig) -> Iterator[Entry]:
  """A dense model's parameters by those of its family's names that the checkpoint has."""
  heads, family = head_keys(config), FAMILIES[config.family]
  others = (rule.key.format(layer=0, expert=0) for rule in family.otherwise if rule not in family.table)
  is_otherwise = any(key in shapes for key in others)
  for entry in entries(config, family.otherwise if is_otherwise else family.table):
    if entry.path[0] == "embed" and config.tie_embeddings and entry.key not in shapes:
      # Some files store the tied pair under the head's name.
      entry = entry._replace(key=next((head for head in heads if head in shapes), entry.key))
    yield entry


def differences(
  found: Mapping[str, Shape], needed: Mapping[str, Shape], optional: Mapping[str, Shape] = {}
) -> list[str]:
  """How arrays differ from those of a model, name → shape: one line for each that is missing, unknown or misshapen."""
  wanted = {**optional, **needed}
  wrong = [name for name, shape in wanted.items() if name in found and found[name] != shape]
  return [
    *(f"missing: {name} {list(shape)}" for name, shape in needed.items() if name not in found),
    *(f"unknown: {name} {list(shape)}" for name, shape in found.items() if name not in wanted),
    *(f"wrong shape: {name} is {list(found[name])}, the config says {list(wanted[name])}" for name in wrong),
  ]
