"""What a train step reads."""

from __future__ import annotations

from typing import Any

from flax import struct


@struct.dataclass
class Batch:
  """Rows of tokens. Build it of NumPy or JAX arrays.

  Attributes:
    tokens: int32 ``[B, T]``.
    weights: float32 ``[B, T]``, how much predicting each token from those before it counts; 0 for padding, prompts, and
      the first token of a document.
    segments: int32 ``[B, T]``, the document in the row that each token belongs to, from 1, 0 for padding; None when
      every row is one document from slot 0, which right-padded rows need no segments for: attention is causal.
  """

  tokens: Any
  weights: Any
  segments: Any = None
