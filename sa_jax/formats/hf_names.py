"""Names of tensors as people's files have them: wrapped by compilers, trainers and multimodal models, or bare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sa_jax.errors import UserError
from sa_jax.formats.family import Family

_WRAPPERS = ("_orig_mod.", "module.")
"""What `torch.compile` and `DistributedDataParallel` put before every name."""

# By how a language model is kept in another: the beginnings of its names, and the usual ones. The first that fits is
# taken; the last is a model that was saved without its head.
_HOLDERS: tuple[Mapping[str, str], ...] = (
  {"": ""},
  {"model.language_model.": "model.", "lm_head.": "lm_head."},
  {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
  {"language_model.": "model.", "lm_head.": "lm_head."},
  {"model.text_model.": "model.", "lm_head.": "lm_head."},
  {"lm_head.": "lm_head.", "": "model."},
)


def usual_names(stored: Iterable[str], family: Family) -> dict[str, str]:
  """The names that a family's table has, where a file has them otherwise: from usual names to the stored ones.

  A name that belongs to no language model stays as it is.

  Raises:
    UserError: if two stored names are one usual name.
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
