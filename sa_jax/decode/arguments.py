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
