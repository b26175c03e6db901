"""Which layer computes attention weights, and which layers reuse them.

A plan is one tuple, ``source``: layer ``l`` uses the attention weights of layer ``source[l]``. Anchors, followers,
groups and runs are derived from it. An optional head map assigns an anchor head to each head of a follower.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

from sa_jax.display import layers_picture
from sa_jax.errors import UserError
from sa_jax.fields import check_fields

HeadMap = tuple[int, ...]
"""For each of a follower's N query heads, the anchor head whose weights it uses."""

_SPAN = re.compile(r"(\d+):(\d+)(?:-(\d+))?")
_EXAMPLE = "'22:23-26' is anchor 22 with followers 23 to 26; several groups are joined by commas"


class LayerGroup(NamedTuple):
  """An anchor and the followers right after it, by layer index."""

  anchor: int
  followers: tuple[int, ...]


class Run(NamedTuple):
  """Consecutive groups with the same number of followers, executed by one ``scan``."""

  start: int
  groups: int
  followers: int

  @property
  def layers(self) -> range:
    """The layers of the run."""
    return range(self.start, self.start + self.groups * (1 + self.followers))


@dataclasses.dataclass(frozen=True)
class SharingPlan:
  """An immutable, hashable Shared Attention plan.

  Attributes:
    source: one entry per layer; ``source[l]`` is the layer whose attention weights layer ``l`` uses, which is ``l``
      for an anchor.
    head_map: one entry per layer; ``head_map[l][n]`` is the anchor head whose weights query head ``n`` of follower
      ``l`` uses. An entry is None for anchors and for the identity, and ``head_map`` is None if all entries are, so
      that equivalent plans are equal. Plan strings do not include head maps.

  Raises:
    UserError: if layer 0 is a follower, a source is outside the model or after its follower, or a follower's source is
      not the nearest anchor before it (groups are contiguous); if an anchor has a head map, or a head map has an
      invalid head.
  """

  source: tuple[int, ...]
  head_map: tuple[HeadMap | None, ...] | None = None

  def __post_init__(self) -> None:
    check_fields(self, "plan")
    self._check_source()
    if self.head_map is not None:
      object.__setattr__(self, "head_map", _normal_head_map(self.head_map, self.source))

  def _check_source(self) -> None:
    if not self.source:
      raise UserError("a plan needs at least one layer")
    anchor = 0
    for layer, source in enumerate(self.source):
      if layer == 0 and source != 0:
        raise UserError("layer 0 cannot be a follower: no layer before it could be its anchor")
      if source == layer:
        anchor = layer
      elif source != anchor:
        raise UserError(
          f"layer {layer} uses the weights of layer {source}, but the nearest anchor before it is {anchor}: "
          f"a follower uses the nearest anchor, so its source is {anchor} (or {layer}, to make it an anchor)"
        )

  @classmethod
  def dense(cls, num_layers: int) -> SharingPlan:
    """The plan in which every layer is an anchor: an ordinary transformer."""
    return cls(tuple(range(num_layers)))

  @classmethod
  def from_followers(cls, num_layers: int, followers: Iterable[int]) -> SharingPlan:
    """The plan with these followers, each of which uses the nearest earlier layer that is not a follower.

    This is the notation of the PyTorch reference (metacarbon/shareAtt): its "shared layers" 23..26 reuse layer 22.

    Args:
      num_layers: the model's depth.
      followers: the follower layers, in any order.

    Raises:
      UserError: if a layer is listed twice, is outside the model, or is layer 0.
    """
    listed = list(followers)
    if duplicates := sorted({layer for layer in listed if listed.count(layer) > 1}):
      raise UserError(f"followers are listed more than once: {duplicates}")
    if outside := sorted(layer for layer in listed if not 0 <= layer < num_layers):
      raise UserError(f"followers {outside} are outside the model, whose layers are 0 to {num_layers - 1}")
    if 0 in listed:
      raise UserError("layer 0 cannot be a follower: no layer before it could be its anchor")
    chosen = set(listed)
    source: list[int] = []
    for layer in range(num_layers):
      source.append(source[-1] if layer in chosen else layer)
    return cls(tuple(source))

  @classmethod
  def parse(cls, text: str, num_layers: int) -> SharingPlan:
    """Parses a plan string such as ``"22:23-26"`` or ``"14:15-18,26:27"``; ``"dense"`` is the plan without followers.

    Every group gives both its anchor and its followers, so the notation is unambiguous.

    Args:
      text: the plan string.
      num_layers: the model's depth.

    Raises:
      UserError: if the text has another form, or a group is reversed, is out of range, overlaps another, or does not
        start right after its anchor.
    """
    text = text.strip()
    if text == "dense":
      return cls.dense(num_layers)
    followers: list[int] = []
    used: set[int] = set()
    for part in map(str.strip, text.split(",")):
      match = _SPAN.fullmatch(part)
      if part.startswith("zoo:"):
        raise UserError(
          f"{part!r} is a plan under which a model must be refitted: `sa-jax share MODEL TEXT --plan {part}`"
        )
      if match is None:
        raise UserError(f"{part!r} is not a group of a plan: {_EXAMPLE}; 'dense' shares nothing")
      anchor, first = int(match[1]), int(match[2])
      last = int(match[3]) if match[3] else first
      group = f"{part!r} in the plan {text!r}"
      if last < first:
        raise UserError(f"{group} is reversed: write '{anchor}:{last}-{first}'")
      if last >= num_layers:
        raise UserError(f"{group} goes past the model, whose layers are 0 to {num_layers - 1}")
      if first != anchor + 1:
        raise UserError(
          f"{group} does not start right after its anchor: the followers of {anchor} start at {anchor + 1}, "
          f"and followers that start at {first} have anchor {max(first - 1, 0)}"
        )
      layers = set(range(anchor, last + 1))
      if overlap := sorted(layers & used):
        raise UserError(f"{group} overlaps an earlier group in layers {overlap}: each layer belongs to one group")
      used |= layers
      followers.extend(range(first, last + 1))
    return cls.from_followers(num_layers, followers)

  def __str__(self) -> str:
    """The plan string, the inverse of `parse`."""
    parts = [
      f"{anchor}:{followers[0]}" + (f"-{followers[-1]}" if len(followers) > 1 else "")
      for anchor, followers in self.groups
      if followers
    ]
    return ",".join(parts) or "dense"

  def _repr_html_(self) -> str:
    """The plan as a picture, for notebooks."""
    mapped = sum(self.head_map_of(layer) is not None for layer in self.followers)
    title = f"{self}: {len(self.followers)} of {self.num_layers} layers follow"
    return layers_picture(self.source, title + (f", {mapped} of them with a head map" if mapped else ""))

  @property
  def num_layers(self) -> int:
    """The depth of the model."""
    return len(self.source)

  @property
  def anchors(self) -> tuple[int, ...]:
    """The layers that compute attention weights."""
    return tuple(layer for layer, source in enumerate(self.source) if layer == source)

  @property
  def followers(self) -> tuple[int, ...]:
    """The layers that reuse the weights of an anchor."""
    return tuple(layer for layer, source in enumerate(self.source) if layer != source)

  @property
  def groups(self) -> tuple[LayerGroup, ...]:
    """Each anchor with its followers, in layer order."""
    by_source = itertools.groupby(enumerate(self.source), key=lambda item: item[1])
    return tuple(LayerGroup(anchor, tuple(layer for layer, _ in members)[1:]) for anchor, members in by_source)

  @property
  def runs(self) -> tuple[Run, ...]:
    """Maximal sequences of consecutive groups with the same number of followers, in layer order."""
    runs = []
    for size, members in itertools.groupby(self.groups, key=lambda group: len(group.followers)):
      groups = list(members)
      runs.append(Run(start=groups[0].anchor, groups=len(groups), followers=size))
    return tuple(runs)

  def is_anchor(self, layer: int) -> bool:
    """Whether the layer computes its own attention weights."""
    return self.source[layer] == layer

  def head_map_of(self, layer: int) -> HeadMap | None:
    """The layer's head map, or None for the identity."""
    return None if self.head_map is None else self.head_map[layer]

  def with_head_maps(self, maps: Mapping[int, Sequence[int] | None]) -> SharingPlan:
    """The same plan with these head maps, by follower; other followers, and those with None, get the identity.

    Raises:
      UserError: as the class does.
    """
    if unknown := sorted(set(maps) - set(range(self.num_layers))):
      raise UserError(f"head maps for layers {unknown}, but the layers are 0 to {self.num_layers - 1}")
    given = [maps.get(layer) for layer in range(self.num_layers)]
    return SharingPlan(self.source, tuple(None if entry is None else tuple(entry) for entry in given))

  def check_heads(self, num_heads: int) -> None:
    """Checks that every head map has one entry per query head.

    Raises:
      UserError: if one does not.
    """
    if self.head_map is None:
      return
    if wrong := [layer for layer, entry in enumerate(self.head_map) if entry is not None and len(entry) != num_heads]:
      raise UserError(f"the head maps of layers {wrong} do not have {num_heads} entries, one per query head")


def _normal_head_map(
  given: Sequence[Sequence[int] | None], source: tuple[int, ...]
) -> tuple[HeadMap | None, ...] | None:
  """The head map with identities replaced by None."""
  if len(given) != len(source):
    raise UserError(f"the head map has {len(given)} entries, but the plan has {len(source)} layers; give one per layer")
  entries: list[HeadMap | None] = []
  errors = []
  for layer, entry in enumerate(given):
    made = None if entry is None else tuple(int(head) for head in entry)
    if made is not None:
      if source[layer] == layer:
        errors.append(f"layer {layer} is an anchor, and only followers have a head map")
      if outside := sorted({head for head in made if not 0 <= head < len(made)}):
        errors.append(f"layer {layer} uses heads {outside}, but its anchor's heads are 0 to {len(made) - 1}")
    entries.append(None if made == tuple(range(len(made or ()))) else made)
  if errors:
    raise UserError.of("head map", errors)
  return None if all(entry is None for entry in entries) else tuple(entries)


PlanLike = SharingPlan | str | Sequence[int] | None
"""A plan, a plan string, a ``source`` list, or None."""


def as_plan(plan: PlanLike, num_layers: int) -> SharingPlan:
  """A plan given in any accepted form: a plan, a plan string, a ``source`` list, or None for dense.

  Raises:
    UserError: if it is not a valid plan for a model of ``num_layers`` layers.
  """
  match plan:
    case None:
      return SharingPlan.dense(num_layers)
    case str():
      return SharingPlan.parse(plan, num_layers)
    case SharingPlan():
      made = plan
    case _:
      made = SharingPlan(cast("tuple[int, ...]", plan))  # checks that it is a sequence
  if made.num_layers != num_layers:
    raise UserError(f"the plan is for {made.num_layers} layers, the model has {num_layers}")
  return made
