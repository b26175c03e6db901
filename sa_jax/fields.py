"""What a dataclass may hold, checked where people build one in Python, as the command line checks its flags."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Annotated, Literal, Union

_PLAIN: dict[type, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
_CALLED = {bool: "True or False", int: "an integer", float: "a number", str: "a text", types.NoneType: "None"}


def misfits(values: object) -> list[str]:
  """What fields of a dataclass of choices, numbers, texts and such dataclasses hold that they may not, a line each.

  Fields of other types, such as paths, are not looked at.
  """
  found: list[str] = []
  hints = typing.get_type_hints(type(values))
  for field in dataclasses.fields(values):  # type: ignore[arg-type]
    value = getattr(values, field.name)
    if dataclasses.is_dataclass(value):
      found += misfits(value)
    elif (wanted := _wanted(hints[field.name])) is not None and not any(_is(value, each) for each in wanted):
      found.append(f"{field.name}={value!r} ({' or '.join(_called(each) for each in wanted)} is needed)")
  return found


def _wanted(hint: object) -> list[object] | None:
  """The choices and plain types that a hint is made of; None where it has others."""
  if typing.get_origin(hint) is Annotated:
    return _wanted(typing.get_args(hint)[0])
  if typing.get_origin(hint) is Literal:
    return [repr(choice) for choice in typing.get_args(hint)]
  if typing.get_origin(hint) in (Union, types.UnionType):
    parts = [_wanted(part) for part in typing.get_args(hint)]
    return None if any(part is None for part in parts) else [each for part in parts for each in part or ()]
  return [hint] if hint in _CALLED else None


def _is(value: object, wanted: object) -> bool:
  if isinstance(wanted, str):
    return repr(value) == wanted
  if wanted is types.NoneType:
    return value is None
  return (
    isinstance(wanted, type)
    and isinstance(value, _PLAIN[wanted])
    and not (isinstance(value, bool) and wanted is not bool)
  )


def _called(wanted: object) -> str:
  return wanted.strip("'") if isinstance(wanted, str) else _CALLED[typing.cast(type, wanted)]
