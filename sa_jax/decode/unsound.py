"""Logits that are not finite: tokens drawn of them mean nothing, and are told of once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_LOG = logging.getLogger("sa_jax")

SOUND = 0
"""What a row has whose logits have been finite; one whose logits were not has -1 less their place."""


def unsound_from(before: jax.Array, logits: jax.Array, places: jax.Array) -> jax.Array:
  """Where each row's logits were first not finite.

  Args:
    before: int32 ``[B]``, of the logits so far.
    logits: float ``[B, V]``, the model's own.
    places: int32 ``[B]``, theirs.

  Returns:
    int32 ``[B]``, see `SOUND`.
  """
  # A sum is not finite where a part is not: one number a row, and no array of V.
  finite = jnp.isfinite(logits.astype(jnp.float32).sum(axis=-1))
  return jnp.where((before == SOUND) & ~finite, -1 - places, before)


def tell_unsound(places: np.ndarray, prompts: Sequence[int], rows: Sequence[int]) -> bool:
  """Warns of the first row whose logits were not finite, if there is one; returns whether there is.

  Args:
    places: int32 ``[B]``, cache slots of the first tokens that were drawn of such logits, as `unsound_from` has them.
    prompts: tokens of each row's prompt.
    rows: the rows' numbers, for people.
  """
  found = [
    (-1 - int(place) - prompt, row) for place, prompt, row in zip(places, prompts, rows, strict=True) if place < 0
  ]
  if found:
    step, row = min(found)
    others = f", and of {len(found) - 1} other rows" if len(found) > 1 else ""
    _LOG.warning(
      "the logits of row %d are NaN or infinite from its new token %d on%s: what follows means nothing; the weights "
      "may be damaged, or the numbers too large for the dtype (float32 has more room than float16)",
      row,
      step + 1,
      others,
    )
  return bool(found)
