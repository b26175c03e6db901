"""Sampling the next token."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.decode.processors import Processor, Start
from sa_jax.errors import UserError
from sa_jax.fields import Constraint, Count, Portion, checked
from sa_jax.trees import Tree

_COLDEST = 1e-6
"""Below this, logits divided by the temperature approach the largest float32."""

_Temperature = Annotated[
  float, Constraint(lambda value: _COLDEST <= value < math.inf, f"0 (greedy) or at least {_COLDEST}")
]
_TopP = Annotated[float, Constraint(lambda value: 0 < value <= 1, "above 0, at most 1")]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["temperature", "top_p", "min_p", "processors"],
  meta_fields=["top_k", "log_probs"],
)
@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is sampled, in Hugging Face's order: processors, temperature, top-k, top-p, min-p.

  A pytree for `jax.jit`: one program serves all temperatures and all p.

  Attributes:
    temperature: divides the logits; 0 or None is greedy (0 becomes None).
    top_k: keep the k likeliest tokens; None keeps all.
    top_p: keep the fewest likeliest tokens whose probabilities sum to p (Holtzman et al., arXiv 1904.09751); None keeps
      all.
    min_p: keep tokens at least this fraction as likely as the likeliest (arXiv 2407.01082); None keeps all.
    processors: rules applied to the logits first, in order (`Processor`): penalties, bans, grammars.
    log_probs: whether to return each sampled token's log-probability under the model's own logits, before any rule.

  Raises:
    UserError: if a value is out of range.
  """

  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  processors: tuple[Processor, ...] = ()
  log_probs: bool = False

  def __post_init__(self) -> None:
    for name in ("temperature", "top_p", "min_p"):
      value = getattr(self, name)
      if isinstance(value, np.generic | np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
        object.__setattr__(self, name, np.asarray(value).item())
    if not all(isinstance(value, str | int | float | None) for value in (self.temperature, self.top_p, self.min_p)):
      return  # inside `jax.jit`, where values are traced; they were checked outside
    object.__setattr__(self, "temperature", self.temperature or None)
    object.__setattr__(self, "processors", tuple(self.processors))
    # Also converted to one type, so that 1 and 1.0 share a program.
    for name, hint in (("temperature", _Temperature), ("top_k", Count), ("top_p", _TopP), ("min_p", Portion)):
      object.__setattr__(self, name, checked(name, getattr(self, name), hint | None))
    if self.temperature is None and any(value is not None for value in (self.top_k, self.top_p, self.min_p)):
      raise UserError("top_k, top_p and min_p choose among samples: set a temperature above 0, or leave them out")

  def check(self, vocab_size: int) -> None:
    """Checks the rules against a vocabulary, outside `jax.jit`.

    Raises:
      UserError: if a rule does not fit it.
    """
    for processor in self.processors:
      processor.check(vocab_size)

  def begin(self, start: Start) -> tuple[Tree, ...]:
    """The states of the rules before the first new token."""
    return tuple(processor.begin(start) for processor in self.processors)

  def processed(self, logits: jax.Array, history: tuple[Tree, ...]) -> jax.Array:
    """Logits float32 ``[B, V]`` after the rules, given their states."""
    for processor, state in zip(self.processors, history, strict=True):
      logits = processor(logits, state)
    return logits

  def after(self, history: tuple[Tree, ...], tokens: jax.Array) -> tuple[Tree, ...]:
    """The states of the rules after the rows' next tokens, int32 ``[B]``."""
    return tuple(processor.after(state, tokens) for processor, state in zip(self.processors, history, strict=True))

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
      # A token is kept while the likelier ones have not yet reached p.
      kept_sorted = (jnp.cumsum(probs, axis=-1) - probs < self.top_p) | (self.top_p >= 1)
      kept = jnp.put_along_axis(jnp.zeros_like(kept_sorted), order, kept_sorted, axis=-1, inplace=False)
      logits = jnp.where(kept, logits, -jnp.inf)
    if self.min_p is not None:
      logits = jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(self.min_p), -jnp.inf, logits)
    return logits

  def probabilities(self, logits: jax.Array) -> jax.Array:
    """The sampling distribution: processed logits float32 ``[B, V]`` → probabilities, one-hot if greedy."""
    if self.temperature is None:
      return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=logits.dtype)
    return jax.nn.softmax(self.filter(logits), axis=-1)

  def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Samples one token per row.

    Args:
      logits: float32 ``[B, V]``, processed.
      keys: ``[B]`` PRNG keys, one per row, so that a row's tokens do not depend on the rest of the batch.

    Returns:
      int32 ``[B]``.
    """
    if self.temperature is None:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, self.filter(logits)).astype(jnp.int32)
