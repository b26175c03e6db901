"""Choosing the next token."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sa_jax.errors import UserError

_COLDEST = 1e-6
"""Below it, logits over the temperature come near the largest float32."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["temperature", "top_p"], meta_fields=["top_k"])
@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is drawn. Filters apply in the order of Hugging Face: temperature, top-k, top-p.

  A value for `jax.jit` to take: one program serves all temperatures, and all p.

  Attributes:
    temperature: divides the logits; 0 or None takes the likeliest token (0 becomes None).
    top_k: keep the k likeliest tokens; None keeps all.
    top_p: keep the fewest likeliest tokens whose probabilities reach p (Holtzman et al., arXiv 1904.09751); None keeps
      all.

  Raises:
    UserError: if a value is out of range.
  """

  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self) -> None:
    if not all(isinstance(value, int | float | None) for value in (self.temperature, self.top_p)):
      return  # inside `jax.jit`, where the values that were checked outside are not known
    # One type, so that 1 and 1.0 are one program.
    object.__setattr__(self, "temperature", float(self.temperature) if self.temperature else None)
    object.__setattr__(self, "top_p", None if self.top_p is None else float(self.top_p))
    if self.temperature is not None and not _COLDEST <= self.temperature < float("inf"):
      raise UserError(f"temperature must be 0 (greedy) or at least {_COLDEST}, not {self.temperature}")
    if self.top_k is not None and self.top_k < 1:
      raise UserError(f"top_k must be at least 1, not {self.top_k}")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise UserError(f"top_p must be in (0, 1], not {self.top_p}")
    if self.temperature is None and (self.top_k is not None or self.top_p is not None):
      raise UserError("top_k and top_p choose among samples: set a temperature above 0, or leave them out")

  def filter(self, logits: jax.Array) -> jax.Array:
    """Scaled logits ``[B, V]``, with -inf at the tokens that are not kept."""
    assert self.temperature is not None, "the likeliest token needs no filter"
    logits = logits / self.temperature
    if self.top_k is not None and self.top_k < logits.shape[-1]:
      kept = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
      logits = jnp.where(logits < kept, -jnp.inf, logits)
    if self.top_p is not None:
      order = jnp.argsort(logits, axis=-1, descending=True)
      probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
      # A token is kept while the likelier ones have not reached p yet.
      kept_sorted = (jnp.cumsum(probs, axis=-1) - probs < self.top_p) | (self.top_p >= 1)
      kept = jnp.put_along_axis(jnp.zeros_like(kept_sorted), order, kept_sorted, axis=-1, inplace=False)
      logits = jnp.where(kept, logits, -jnp.inf)
    return logits

  def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draws a token a row.

    Args:
      logits: float32 ``[B, V]``.
      keys: ``[B]`` PRNG keys, one a row, so that a row's tokens do not depend on what else is in the batch.

    Returns:
      int32 ``[B]``.
    """
    if self.temperature is None:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, self.filter(logits)).astype(jnp.int32)
