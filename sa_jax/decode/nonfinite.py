"""Detects non-finite logits and warns once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_LOG = logging.getLogger("sa_jax")

FINITE = 0
"""The value for a row with only finite logits; otherwise it is -1 minus the first position with non-finite logits."""


def nonfinite_from(before: jax.Array, logits: jax.Array, places: jax.Array) -> jax.Array:
  """Where each row's logits first became non-finite.

  Args:
    before: int32 ``[B]``, the result so far.
    logits: float ``[B, V]``, the model's own.
    places: int32 ``[B]``, their positions.

  Returns:
    int32 ``[B]``, see `FINITE`.
  """
  # A sum is non-finite if any part is: one number per row instead of V.
  finite = jnp.isfinite(logits.astype(jnp.float32).sum(axis=-1))
  return jnp.where((before == FINITE) & ~finite, -1 - places, before)


def warn_nonfinite(places: np.ndarray, prompts: Sequence[int], rows: Sequence[int]) -> bool:
  """Warns about the first row with non-finite logits, if any; returns whether there is one.

  Args:
    places: int32 ``[B]``, cache slots of the first tokens sampled from such logits, as `nonfinite_from` has them.
    prompts: tokens of each row's prompt.
    rows: row numbers for the message.
  """
  found = [
    (-1 - int(place) - prompt, row) for place, prompt, row in zip(places, prompts, rows, strict=True) if place < 0
  ]
  if found:
    step, row = min(found)
    others = f", and of {len(found) - 1} other rows" if len(found) > 1 else ""
    _LOG.warning(
      "the logits of row %d are NaN or infinite from its new token %d on%s: later tokens are meaningless; the "
      "weights may be damaged, or the numbers too large for the dtype (float32 has more range than float16)",
      row,
      step + 1,
      others,
    )
  return bool(found)
