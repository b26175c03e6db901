"""Tensor names as found in the wild: with prefixes of compilers, trainers and multimodal models, or without any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sa_jax.errors import UserError
from sa_jax.formats.family import Family

_WRAPPERS = ("_orig_mod.", "module.")
"""Prefixes that `torch.compile` and `DistributedDataParallel` add to every name."""

# Name prefixes of language models inside other models → the usual ones. The first match is used; the last entry is
# a model saved without its head.
_HOLDERS: tuple[Mapping[str, str], ...] = (
  {"": ""},
  {"model.language_model.": "model.", "lm_head.": "lm_head."},
  {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
  {"language_model.": "model.", "lm_head.": "lm_head."},
  {"model.text_model.": "model.", "lm_head.": "lm_head."},
  {"lm_head.": "lm_head.", "": "model."},
)


def usual_names(stored: Iterable[str], family: Family) -> dict[str, str]:
  """A family's tensor names → the names in a file that uses different ones.

  Names outside the language model are unchanged.

  Raises:
    UserError: if two stored names map to the same usual name.
  """
  bare = _each_once((_unwrapped(name), name) for name in stored)
  probe = next(rule.key for rule in family.table if "{layer}" in rule.key and not rule.when).format(layer=0)
  for holder in _HOLDERS:
    if any(_usual(name, holder) == probe for name in bare):
      return _each_once((_usual(name, holder), own) for name, own in bare.items())
  return {name: name for name in bare.values()}


def _each_once(names: Iterable[tuple[str, str]]) -> dict[str, str]:
  found: dict[str, str] = {}
  for usual, own in names:
    if (other := found.setdefault(usual, own)) != own:
      raise UserError(f"{other} and {own} are two names of one tensor, and the files have both; remove one")
  return found


def _unwrapped(name: str) -> str:
  while name.startswith(_WRAPPERS):
    name = name.split(".", 1)[1]
  return name


def _usual(name: str, holder: Mapping[str, str]) -> str:
  for theirs, ours in holder.items():
    if name.startswith(theirs):
      return ours + name.removeprefix(theirs)
  return name
