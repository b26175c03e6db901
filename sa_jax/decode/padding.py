"""Rows of unequal length. Internally, rows are right-padded: token ``i`` is at slot ``i``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sa_jax.errors import UserError


def right_pad(rows: Sequence[Sequence[int] | np.ndarray], pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Turns token lists into one padded batch.

  Args:
    rows: token ids, at least one per row.
    pad: the padding token.

  Returns:
    int32 ``[B, T]`` tokens and int32 ``[B]`` lengths.

  Raises:
    UserError: if there is no row, or a row is empty.
  """
  if not rows or not all(len(row) for row in rows):
    raise UserError("every row needs at least one token")
  lengths = np.array([len(row) for row in rows], np.int32)
  tokens = np.full((len(rows), int(lengths.max())), pad, np.int32)
  for row, values in zip(tokens, rows, strict=True):
    row[: len(values)] = values
  return tokens, lengths


def to_right_padded(tokens: np.ndarray, attention_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Turns a Hugging Face batch, padded on either side, into a right-padded one.

  Args:
    tokens: int ``[B, T]``.
    attention_mask: ``[B, T]``, 1 at tokens and 0 at padding.

  Returns:
    ``[B, T]`` tokens in their dtype and int32 ``[B]`` lengths.

  Raises:
    UserError: if the mask has another shape or other values, or a row has no tokens or they are not contiguous.
  """
  tokens, mask = np.asarray(tokens), np.asarray(attention_mask)
  if tokens.ndim != 2 or mask.shape != tokens.shape:
    raise UserError(f"tokens and attention_mask must both be [batch, length], not {tokens.shape} and {mask.shape}")
  if not np.isin(mask, (0, 1)).all():
    raise UserError("attention_mask must be 1 at tokens and 0 at padding")
  starts = mask.argmax(axis=1)
  lengths = mask.sum(axis=1)
  slots = np.arange(mask.shape[1])
  contiguous = (slots >= starts[:, None]) & (slots < (starts + lengths)[:, None])
  if wrong := np.flatnonzero((lengths == 0) | (contiguous != mask.astype(bool)).any(axis=1)).tolist():
    raise UserError(f"rows {wrong} are empty, or have padding between tokens; pad on one side only")
  shifted = np.take_along_axis(tokens, (slots + starts[:, None]) % mask.shape[1], axis=1)
  return shifted, lengths.astype(np.int32)
