"""Numbers that generation is asked for, checked at its doors."""

import numpy as np

from sa_jax.errors import UserError


def check_seed(seed: int) -> None:
  """Checks a seed of samples.

  Raises:
    UserError: if it is not an integer of 32 bits.
  """
  if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 32:
    raise UserError(f"a seed is an integer in 0 to {(1 << 32) - 1}, not {seed!r}")


def check_row(row: int) -> None:
  """Checks a number that tells rows with one seed apart.

  Raises:
    UserError: if it is not an integer that an int32 holds, 0 or more.
  """
  if not isinstance(row, int | np.integer) or not 0 <= row < 1 << 31:
    raise UserError(f"a row's number is an integer in 0 to {(1 << 31) - 1}, not {row!r}")


def as_count(name: str, value: int) -> int:
  """A number of things, of any integer type.

  Raises:
    UserError: if it is no integer, or below 1.
  """
  if not isinstance(value, int | np.integer):
    raise UserError(f"{name} is an integer, not {value!r}")
  if value < 1:
    raise UserError(f"{name} must be at least 1, not {value}")
  return int(value)
