"""Validation of settings dataclasses: annotations say what a field may hold, and `check_fields` checks it.

These dataclasses are built in Python as well as from flags. Reasonable values of other types are converted to the
field's type: a string for a path, a list for a tuple, NumPy numbers.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar, Union

from sa_jax.errors import UserError, shown
from sa_jax.files import as_path

T = TypeVar("T")


class Constraint(NamedTuple):
  """In `Annotated`: which values of a type a field may hold.

  Attributes:
    holds: whether a value is allowed.
    words: a description of allowed values, for errors.
  """

  holds: Callable[..., bool]
  words: str


Count = Annotated[int, Constraint(lambda number: number >= 1, "at least 1")]
Natural = Annotated[int, Constraint(lambda number: number >= 0, "0 or more")]
Seed = Annotated[int, Constraint(lambda number: 0 <= number < 1 << 32, f"0 to {(1 << 32) - 1}")]
Positive = Annotated[float, Constraint(lambda number: number > 0, "a positive number")]
NotNegative = Annotated[float, Constraint(lambda number: number >= 0, "0 or more")]
Portion = Annotated[float, Constraint(lambda number: 0 <= number <= 1, "0 to 1")]


def check_fields(values: object, subject: str) -> None:
  """Checks a dataclass by its annotations, in its ``__post_init__``, and converts values of other types.

  Nested dataclasses are assumed to have checked themselves.

  Args:
    values: the dataclass.
    subject: its name in errors.

  Raises:
    UserError: names all invalid fields.
  """
  if wrong := misfits(values):
    raise UserError.of(subject, wrong)


def checked(name: str, value: T, hint: object) -> T:
  """An argument converted to a type hint, as `check_fields` does for a field.

  Raises:
    UserError: if it does not fit.
  """
  try:
    return typing.cast("T", _fitted(value, hint))
  except _Misfit as misfit:
    raise UserError(_message(name, value, misfit)) from None


def _message(name: str, value: object, misfit: _Misfit) -> str:
  return f"{name}={shown(value)} (must be {misfit})"


def misfits(values: object) -> list[str]:
  """The faults that `check_fields` would report, one line each."""
  found = []
  for name, hint in _hints(type(values)).items():  # type: ignore[arg-type]
    value = getattr(values, name)
    try:
      fitted = _fitted(value, hint)
    except _Misfit as misfit:
      found.append(_message(name, value, misfit))
    else:
      if fitted is not value:
        object.__setattr__(values, name, fitted)  # frozen dataclasses too
  return found


class _Misfit(Exception):
  """Says what would be valid."""


class _NearMisfit(_Misfit):
  """Says what would be valid for the value's type."""


@functools.cache
def _hints(kind: type) -> dict[str, object]:
  hints = typing.get_type_hints(kind, include_extras=True)
  return {name: hints[name] for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]


def _fitted(value: object, hint: object) -> object:
  """The value converted to a type hint; hints that are not classes accept anything.

  Raises:
    _Misfit: if it does not fit.
  """
  origin, parts = typing.get_origin(hint), typing.get_args(hint)
  if origin is Annotated:
    fitted = _fitted(value, parts[0])
    for constraint in parts[1:]:
      if isinstance(constraint, Constraint) and not constraint.holds(fitted):
        raise _NearMisfit(constraint.words)
    return fitted
  if origin in (Union, types.UnionType):
    return _fitted_to_one(value, parts)
  if origin is Literal:
    if any(value is choice or (type(value) is type(choice) and value == choice) for choice in parts):
      return value
    raise _Misfit(f"{'one of ' if len(parts) > 2 else ''}{(', ' if len(parts) > 2 else ' or ').join(map(str, parts))}")
  if origin is tuple:
    return _fitted_tuple(value, parts)
  kind = origin or hint
  if not isinstance(kind, type):
    return value
  if kind in _FORMS:
    return _FORMS[kind](value)
  if not isinstance(value, kind):
    raise _Misfit(f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}")
  return value


def _fitted_to_one(value: object, hints: tuple[object, ...]) -> object:
  failed = []
  for hint in hints:
    try:
      return _fitted(value, hint)
    except _Misfit as misfit:
      failed.append(misfit)
  near = [misfit for misfit in failed if isinstance(misfit, _NearMisfit)]
  raise _Misfit(" or ".join(dict.fromkeys(map(str, near or failed))))


def _fitted_tuple(value: object, parts: tuple[object, ...]) -> tuple[object, ...]:
  size = None if parts[-1:] == (Ellipsis,) else len(parts)
  if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
    raise _Misfit("a tuple" if size is None else f"a tuple of {size}")
  values = tuple(value)
  if size not in (None, len(values)):
    raise _NearMisfit(f"a tuple of {size}")
  try:
    fitted = tuple(map(_fitted, values, parts[:1] * len(values) if size is None else parts))
  except _Misfit as misfit:
    raise _NearMisfit(f"a tuple in which each entry is {misfit}") from None
  same = isinstance(value, tuple) and all(new is old for new, old in zip(fitted, values, strict=True))
  return typing.cast("tuple[object, ...]", value) if same else fitted


def _none(value: object) -> None:
  if value is not None:
    raise _Misfit("None")


def _bool(value: object) -> bool:
  if not isinstance(value, bool):
    raise _Misfit("True or False")
  return value


def _int(value: object) -> int:
  if not isinstance(value, numbers.Integral) or isinstance(value, bool):
    raise _Misfit("an integer")
  return int(value)


def _float(value: object) -> float:
  if not isinstance(value, numbers.Real) or isinstance(value, bool):
    raise _Misfit("a number")
  try:
    number = float(value)
  except OverflowError:
    number = math.inf
  if not math.isfinite(number):
    raise _NearMisfit("a finite number")
  return number


def _str(value: object) -> str:
  if not isinstance(value, str | os.PathLike):
    raise _Misfit("a string")
  return os.fspath(value)


def _path(value: object) -> Path:
  if not isinstance(value, str | os.PathLike):
    raise _Misfit("a path")
  return as_path(value)


_FORMS: Mapping[object, Callable[[object], object]] = {
  types.NoneType: _none,
  bool: _bool,
  int: _int,
  float: _float,
  str: _str,
  Path: _path,
}
