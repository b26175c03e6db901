"""Static options of attention: window, soft cap and scale."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from sa_jax.errors import UserError

KEPT = "attention"
"""`checkpoint_name` of the residuals of fused backends: the output and each query's log-sum-exp."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """Static options of attention, common to all backends.

  Attributes:
    window: size of the sliding window in tokens, including the query's own; None for no window.
    softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2, arXiv 2408.00118); None for
      no cap.
    scale: factor of ``q kᵀ``; None for ``1 / sqrt(H)``.

  Raises:
    UserError: if a value is not positive.
  """

  window: int | None = None
  softcap: float | None = None
  scale: float | None = None

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None and not value > 0:
        raise UserError(f"attention {field.name}={value!r} (must be a positive number or None)")

  def scale_for(self, head_dim: int) -> float:
    """The factor of ``q kᵀ`` for heads of this dimension."""
    return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale

  def scores(self, products: jax.Array, head_dim: int) -> jax.Array:
    """Scaled and capped scores, before the mask, from float32 ``q kᵀ``."""
    scores = products * self.scale_for(head_dim)
    return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)
