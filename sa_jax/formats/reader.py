"""Strict reading of a ``config.json``: every value is checked, every key accounted for, every fault reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class ConfigReader:
  """Takes values out of a config and remembers which keys were read and what was wrong with them.

  Attributes:
    values: the config.
    errors: one line a fault.
  """

  def __init__(self, values: Mapping[str, Any], errors: list[str], prefix: str = ""):
    self.values, self._prefix, self.errors = values, prefix, errors
    self._read: set[str] = set()

  def fail(self, key: str, why: str) -> None:
    """Notes a fault of a key."""
    self.errors.append(f"{self._prefix}{key} = {self.values.get(key)!r}: {why}")

  def take(self, key: str, default: Any = None) -> Any:
    """A value as it is; the default when it is absent or null."""
    self._read.add(key)
    value = self.values.get(key)
    return default if value is None else value

  def integer(self, key: str, default: int | None = None) -> int:
    """A positive integer."""
    value = self.take(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
      self.fail(key, "a positive integer is needed")
      return 1
    return value

  def number(self, key: str, default: float | None = None) -> float:
    """A positive number."""
    value = self.take(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
      self.fail(key, "a positive number is needed")
      return 1.0
    return float(value)

  def optional_number(self, key: str) -> float | None:
    """A positive number, or None when it is absent or null."""
    return None if self.take(key) is None else self.number(key)

  def flag(self, key: str, default: bool) -> bool:
    """True or false."""
    value = self.take(key, default)
    if not isinstance(value, bool):
      self.fail(key, "true or false is needed")
      return default
    return value

  def token(self, key: str, absent: int | None) -> int | None:
    """A token id or null."""
    self._read.add(key)
    value = self.values.get(key, absent)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
      self.fail(key, "a token id or null is needed")
      return None
    return value

  def choice(self, key: str, choices: tuple[Any, ...], default: Any) -> Any:
    """One of the values that are implemented."""
    value = self.take(key, default)
    if value not in choices or (isinstance(value, bool) and not any(value is choice for choice in choices)):
      self.fail(key, f"not implemented; {' or '.join(map(repr, choices))} is")
      return default
    return value

  def either(self, key: str, older: str, default: Any) -> Any:
    """A value that has two names; it may not be given twice with two meanings."""
    value, old = self.take(key), self.take(older)
    if value is not None and old is not None and value != old:
      self.fail(older, f"{key} says {value!r}; keep one of them")
    return default if value is None and old is None else old if value is None else value

  def finish(self, inert: Iterable[str] = ()) -> None:
    """Reports every key that nothing has read and that is not inert."""
    for key in self.values:
      if key not in self._read and key not in inert:
        self.fail(key, "this key is not known, so its effect is not implemented; remove it if it has none")
