"""The texts that calibration and evaluation read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sa_jax.errors import UserError
from sa_jax.evaluation.perplexity import check_length
from sa_jax.nn.transformer import check_tokens


class Text(NamedTuple):
  """One text to evaluate plans on.

  Attributes:
    name: the text's name.
    calibration: int ``[rows, T]``, the rows to fit to.
    judging: int ``[rows, T]``, held-out rows, for losses.
  """

  name: str
  calibration: np.ndarray
  judging: np.ndarray


def check_texts(texts: Sequence[Text], vocab_size: int) -> None:
  """Checks calibration and held-out rows.

  Raises:
    UserError: if there is no text, names repeat, tokens are not in the vocabulary, or row lengths differ or are less
      than 2.
  """
  names = [text.name for text in texts]
  if not names or len(set(names)) < len(names):
    raise UserError(f"give one or more texts with different names, not {', '.join(names) or 'none'}")
  for part in ("calibration", "judging"):
    rows = [np.asarray(getattr(text, part)) for text in texts]
    for tokens in rows:
      check_tokens(tokens, None, vocab_size)
    if len(lengths := sorted({tokens.shape[1] for tokens in rows})) > 1:
      raise UserError(f"all rows need the same length; those for {part} have {', '.join(map(str, lengths))} tokens")
    check_length(*lengths)


def check_dense(losses: Mapping[str, float]) -> None:
  """Checks the dense model's loss on each text, with which everything is compared.

  Raises:
    UserError: if one is not a finite number.
  """
  if wrong := [name for name, loss in losses.items() if not math.isfinite(loss)]:
    raise UserError(
      f"the dense model's loss on {', '.join(wrong)} is not a finite number: its weights are damaged, or it needs "
      "float32 (`dtype`)"
    )
