"""Rules about the next token: logits in, logits out, with the tokens of each row so far as explicit state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sa_jax.errors import UserError
from sa_jax.trees import Tree

_value = functools.partial(functools.partial, jax.tree_util.register_dataclass)


@struct.dataclass
class Start:
  """Input for a rule's initial state.

  Attributes:
    tokens: int32 ``[B, T]``, the prompts, right-padded.
    lengths: int32 ``[B]``.
    room: max tokens per row, including the prompt.
    vocab_size: ``V``.
  """

  tokens: jax.Array
  lengths: jax.Array
  room: int = struct.field(pytree_node=False)
  vocab_size: int = struct.field(pytree_node=False)

  @property
  def counts(self) -> jax.Array:
    """Count of each token in each prompt, int32 ``[B, V]``."""
    batch, length = self.tokens.shape
    rows = jnp.arange(batch)[:, None]
    inside = jnp.arange(length)[None] < self.lengths[:, None]
    return jnp.zeros((batch, self.vocab_size), jnp.int32).at[rows, self.tokens].add(inside.astype(jnp.int32))


class Processor:
  """A rule about the next token; subclasses are pytrees, e.g. dataclasses under `jax.tree_util.register_dataclass`.

  Its state is a tree of arrays with a leading batch axis, so that rows can enter and leave a batch.
  """

  def check(self, vocab_size: int) -> None:
    """Checks the rule against a vocabulary, outside `jax.jit`.

    Raises:
      UserError: if it names tokens outside the vocabulary.
    """

  def begin(self, start: Start) -> Tree:
    """The state before the first new token; empty by default."""
    return ()

  def __call__(self, logits: jax.Array, state: Tree) -> jax.Array:
    """Transforms logits float32 ``[B, V]``; -inf forbids a token."""
    raise NotImplementedError

  def after(self, state: Tree, tokens: jax.Array) -> Tree:
    """The state after the rows' next tokens, int32 ``[B]``."""
    return state


def _bump(counts: jax.Array, tokens: jax.Array) -> jax.Array:
  return counts.at[jnp.arange(tokens.shape[0]), tokens].add(1)


@_value(data_fields=["penalty"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(Processor):
  """Makes tokens of the prompt and the answer less likely (Keskar et al., arXiv 1909.05858).

  Attributes:
    penalty: divides their positive logits and multiplies their negative ones; 1 for none.
  """

  penalty: float

  def __post_init__(self) -> None:
    if isinstance(self.penalty, int | float) and not 0 < self.penalty < float("inf"):
      raise UserError(f"a repetition penalty must be positive and finite, not {self.penalty}")

  def begin(self, start: Start) -> jax.Array:
    """Count of each token in each row, int32 ``[B, V]``."""
    return start.counts

  def __call__(self, logits: jax.Array, state: jax.Array) -> jax.Array:
    """See the class."""
    penalised = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
    return jnp.where(state > 0, penalised, logits)

  def after(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
    """With the new tokens added."""
    return _bump(state, tokens)


@_value(data_fields=["frequency", "presence"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class CountPenalty(Processor):
  """Subtracts penalties from the logits of tokens that the answer contains.

  Attributes:
    frequency: subtracted per occurrence.
    presence: subtracted once, if the token occurs.
  """

  frequency: float = 0.0
  presence: float = 0.0

  def begin(self, start: Start) -> jax.Array:
    """Count of each token in each answer, int32 ``[B, V]``."""
    return jnp.zeros((start.tokens.shape[0], start.vocab_size), jnp.int32)

  def __call__(self, logits: jax.Array, state: jax.Array) -> jax.Array:
    """See the class."""
    counts = state.astype(logits.dtype)
    return logits - self.frequency * counts - self.presence * jnp.minimum(counts, 1)

  def after(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
    """With the new tokens added."""
    return _bump(state, tokens)


class _OfTokens(Processor):
  """A rule about a set of tokens."""

  tokens: Tree

  def __post_init__(self) -> None:
    if isinstance(self.tokens, Sequence):
      object.__setattr__(self, "tokens", np.array(self.tokens, np.int32).reshape(-1))

  def check(self, vocab_size: int) -> None:
    """See `Processor`."""
    if wrong := [int(token) for token in self.tokens if not 0 <= token < vocab_size]:
      raise UserError(f"{type(self).__name__} has invalid tokens {wrong}; the vocabulary is 0 to {vocab_size - 1}")


@_value(data_fields=["tokens"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Ban(_OfTokens):
  """Forbids tokens.

  Attributes:
    tokens: their ids.
  """

  tokens: Tree

  def __call__(self, logits: jax.Array, state: Tree) -> jax.Array:
    """See the class."""
    return logits.at[:, self.tokens].set(-jnp.inf)


@_value(data_fields=["tokens"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Allow(_OfTokens):
  """Forbids all other tokens.

  Attributes:
    tokens: ids of the allowed tokens, including the model's end tokens if a row may end.
  """

  tokens: Tree

  def __call__(self, logits: jax.Array, state: Tree) -> jax.Array:
    """See the class."""
    return jnp.full_like(logits, -jnp.inf).at[:, self.tokens].set(logits[:, self.tokens])


@_value(data_fields=["tokens", "values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Bias(_OfTokens):
  """Adds to the logits of tokens.

  Attributes:
    tokens: their ids, all different.
    values: the value added to each, or one for all.
  """

  tokens: Tree
  values: Tree

  def __call__(self, logits: jax.Array, state: Tree) -> jax.Array:
    """See the class."""
    return logits.at[:, self.tokens].add(jnp.asarray(self.values, logits.dtype))


@_value(data_fields=["tokens", "least"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class NotBefore(_OfTokens):
  """Forbids tokens, such as a model's end tokens, until an answer has a minimum length.

  Attributes:
    tokens: their ids.
    least: how many other tokens must come first.
  """

  tokens: Tree
  least: int

  def begin(self, start: Start) -> jax.Array:
    """Number of tokens in each answer, int32 ``[B]``."""
    return jnp.zeros(start.tokens.shape[0], jnp.int32)

  def __call__(self, logits: jax.Array, state: jax.Array) -> jax.Array:
    """See the class."""
    return jnp.where((state < self.least)[:, None], logits.at[:, self.tokens].set(-jnp.inf), logits)

  def after(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
    """Incremented by one."""
    return state + 1


@_value(data_fields=["allowed", "following", "first"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Automaton(Processor):
  """Restricts answers to a regular language: a finite automaton over tokens, on the device.

  Attributes:
    allowed: bool ``[Q, V]``, which tokens are allowed in each state; at least one.
    following: int32 ``[Q, V]``, the next state per token.
    first: the state before the first new token.
  """

  allowed: Tree
  following: Tree
  first: int = 0

  def check(self, vocab_size: int) -> None:
    """See `Processor`."""
    shapes = np.shape(self.allowed), np.shape(self.following)
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != vocab_size:
      raise UserError(
        f"an automaton's tables must both be [states, vocabulary], with a vocabulary of {vocab_size}; "
        f"not {shapes[0]} and {shapes[1]}"
      )
    states = np.append(np.asarray(self.following).ravel(), self.first)
    if outside := sorted({*states[(states < 0) | (states >= shapes[0][0])].tolist()}):
      raise UserError(
        f"an automaton of {shapes[0][0]} states has no states {outside}: they are 0 to {shapes[0][0] - 1}"
      )
    if dead := np.flatnonzero(~np.asarray(self.allowed).any(axis=1)).tolist():
      raise UserError(f"states {dead} of the automaton allow no token; allow at least one, such as an end token")

  def begin(self, start: Start) -> jax.Array:
    """The automaton's state per row, int32 ``[B]``."""
    return jnp.full(start.tokens.shape[0], self.first, jnp.int32)

  def __call__(self, logits: jax.Array, state: jax.Array) -> jax.Array:
    """See the class."""
    return jnp.where(jnp.asarray(self.allowed)[state], logits, -jnp.inf)

  def after(self, state: jax.Array, tokens: jax.Array) -> jax.Array:
    """The next states."""
    return jnp.asarray(self.following)[state, tokens].astype(jnp.int32)


@struct.dataclass
class History:
  """The tokens of rows.

  Attributes:
    tokens: int32 ``[B, S]``, right-padded.
    prompts: int32 ``[B]``, prompt lengths.
    lengths: int32 ``[B]``, tokens so far, prompt included.
  """

  tokens: jax.Array
  prompts: jax.Array
  lengths: jax.Array


@_value(data_fields=[], meta_fields=["function"])
@dataclasses.dataclass(frozen=True)
class HostMask(Processor):
  """Calls a Python function on the host for the tokens allowed next, e.g. for a parser's grammar.

  Each function compiles a separate program. Every token takes a host round trip: use an `Automaton` if it can express
  the same.

  Attributes:
    function: takes a row's prompt and its new tokens, both int32; returns bool ``[V]``. It is also called for rows that
      have ended, with tokens after an end token, and for empty slots. That answer is ignored, but it must not raise.
  """

  function: Callable[[np.ndarray, np.ndarray], np.ndarray]

  def begin(self, start: Start) -> History:
    """The prompts."""
    batch, length = start.tokens.shape
    tokens = jnp.zeros((batch, max(start.room, length)), jnp.int32).at[:, :length].set(start.tokens)
    lengths = jnp.asarray(start.lengths)
    return History(tokens, lengths, lengths + 0)  # a copy: a donated state must not hold an array twice

  def __call__(self, logits: jax.Array, state: History) -> jax.Array:
    """See the class."""

    def ask(tokens: np.ndarray, prompts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
      rows = (np.asarray(x) for x in (tokens, prompts, lengths))
      return np.stack([self.function(row[:prompt], row[prompt:length]) for row, prompt, length in zip(*rows)])

    shape = jax.ShapeDtypeStruct(logits.shape, jnp.bool_)
    allowed = jax.pure_callback(ask, shape, state.tokens, state.prompts, state.lengths)
    return jnp.where(allowed, logits, -jnp.inf)

  def after(self, state: History, tokens: jax.Array) -> History:
    """With the new tokens added."""
    rows = jnp.arange(tokens.shape[0])
    written = state.tokens.at[rows, state.lengths].set(tokens, mode="drop")
    return dataclasses.replace(state, tokens=written, lengths=state.lengths + 1)
