"""Reading a ``config.json``: checks every value, accounts for every key, reports every error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]
"""The contents of a ``config.json``, or of an object inside one."""

Fields = dict[str, Any]
"""Fields of `ModelConfig`, or keys of a ``config.json``, under construction."""


class Fixed(NamedTuple):
  """A key of which only some values are implemented.

  Attributes:
    values: the implemented values; the first is the default.
    meaning: the feature that other values select, as a noun phrase for errors.
  """

  values: tuple[Any, ...]
  meaning: str


class ConfigReader:
  """Reads values from a config, and records which keys were read and which errors were found.

  Attributes:
    values: the config.
    errors: one line per error.
    unknown: the unknown keys, with their values.
  """

  def __init__(self, values: Config, spelled: Mapping[str, str] | None = None):
    """``spelled`` maps keys to the config's names for them."""
    self.values = values
    self._spelled = spelled or {}
    self.errors: list[str] = []
    self.unknown: list[str] = []
    self._prefix = ""
    self._read: set[str] = set()

  def inner(self, values: Config, prefix: str) -> ConfigReader:
    """A reader of a nested object, which shares the lists of errors and unknown keys."""
    made = ConfigReader(values)
    made.errors, made.unknown, made._prefix = self.errors, self.unknown, prefix
    return made

  def fail(self, key: str, why: str) -> None:
    """Records an error of a key."""
    self.errors.append(f"{self._name(key)} = {self.values.get(key)!r}: {why}")

  def _name(self, key: str) -> str:
    return self._prefix + self._spelled.get(key, key)

  def take(self, key: str, default: Any = None) -> Any:
    """A value, unchecked; the default if absent or null."""
    self._read.add(key)
    value = self.values.get(key)
    return default if value is None else value

  def integer(self, key: str, default: int | None = None) -> int:
    """A positive integer."""
    value = self.take(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
      self.fail(key, "must be a positive integer")
      return 1
    return value

  def number(self, key: str, default: float | None = None) -> float:
    """A positive number."""
    value = self.take(key, default)
    if not _is_positive(value):
      self.fail(key, "must be a positive number")
      return 1.0
    return float(value)

  def optional_number(self, key: str) -> float | None:
    """A positive number, or None if absent or null."""
    return None if self.take(key) is None else self.number(key)

  def numbers(self, key: str, count: int) -> list[float]:
    """A list of ``count`` positive numbers."""
    values = self.take(key)
    if not isinstance(values, list) or len(values) != count or not all(_is_positive(value) for value in values):
      self.fail(key, f"must be a list of {count} positive numbers")
      return [1.0] * count
    return [float(value) for value in values]

  def flag(self, key: str, default: bool) -> bool:
    """True or false."""
    value = self.take(key, default)
    if not isinstance(value, bool):
      self.fail(key, "must be true or false")
      return default
    return value

  def token(self, key: str, absent: int | None) -> int | None:
    """A token id or null."""
    self._read.add(key)
    value = self.values.get(key, absent)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
      self.fail(key, "must be a token id or null")
      return None
    return value

  def choice(self, key: str, choices: tuple[Any, ...], default: Any) -> Any:
    """One of the implemented values."""
    value = self.take(key, default)
    if not _is_one_of(value, choices):
      self.fail(key, f"not implemented; must be {' or '.join(map(repr, choices))}")
      return default
    return value

  def fixed(self, key: str, allowed: Fixed) -> None:
    """Checks a key of which only some values are implemented."""
    if not _is_one_of(self.take(key, allowed.values[0]), allowed.values):
      self.fail(key, f"{allowed.meaning} is not implemented; must be {' or '.join(map(repr, allowed.values))}")

  def either(self, key: str, older: str, default: Any) -> Any:
    """A value that has two names; giving both with different values is an error."""
    value, old = self.take(key), self.take(older)
    if value is not None and old is not None and value != old:
      self.fail(older, f"conflicts with {key} = {value!r}; keep one of them")
    return default if value is None and old is None else old if value is None else value

  def finish(self, inert: Iterable[str] = ()) -> None:
    """Records as unknown every key that was not read and is not inert."""
    for key, value in self.values.items():
      if key not in self._read and key not in inert:
        self.unknown.append(f"{self._name(key)} = {value!r}")


def _is_positive(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
  """Whether a value is among the choices; True does not equal 1."""
  return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)
