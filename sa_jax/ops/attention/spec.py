"""What an attention computes besides the causal mask."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from sa_jax.errors import UserError

KEPT = "attention"
"""The name under which fused backends leave, for rematerialisation, what their backward pass needs of their forward
pass: the output and each query's log of sums."""


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """The static options of an attention, the same in every backend.

  Attributes:
    window: how many tokens a query sees, itself included (sliding window); all before it when None.
    softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2, arXiv 2408.00118).
    scale: what ``q kᵀ`` is multiplied by; ``1 / sqrt(H)`` when None.

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
        raise UserError(f"attention {field.name} = {value!r}: a positive number or None is needed")

  def scale_for(self, head_dim: int) -> float:
    """What ``q kᵀ`` is multiplied by."""
    return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale

  def scores(self, products: jax.Array, head_dim: int) -> jax.Array:
    """Scaled and capped scores, not yet masked, from float32 ``q kᵀ``."""
    scores = products * self.scale_for(head_dim)
    return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)
