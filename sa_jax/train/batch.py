"""The input of a train step."""

from __future__ import annotations

from typing import Any

from flax import struct


@struct.dataclass
class Batch:
  """Rows of tokens, as NumPy or JAX arrays.

  Attributes:
    tokens: int32 ``[B, T]``.
    weights: float32 ``[B, T]``, weight of the loss for predicting each token from those before it; 0 for padding,
      prompts, and the first token of a document.
    segments: int32 ``[B, T]``, each token's document within the row, from 1, 0 for padding; None if every row is one
      document from slot 0. Right-padded rows need no segments, because attention is causal.
  """

  tokens: Any
  weights: Any
  segments: Any = None
