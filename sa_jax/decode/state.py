"""A batch in the middle of generation, and rows that enter and leave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sa_jax.decode.sampling import Sampler
from sa_jax.decode.unsound import SOUND
from sa_jax.nn import Cache
from sa_jax.programs import program
from sa_jax.trees import Tree


@struct.dataclass
class Prompts:
  """Rows to be continued.

  Attributes:
    tokens: int32 ``[B, T]``, right-padded.
    lengths: int32 ``[B]``.
    new: int32 ``[B]``, most tokens to add to each row, at least one.
    seeds: uint32 ``[B]``.
    numbers: int32 ``[B]``; a row's samples depend on its seed and its number, and on nothing else.
  """

  tokens: Tree
  lengths: Tree
  new: Tree
  seeds: Tree
  numbers: Tree

  @classmethod
  def of(
    cls, rows: Sequence[np.ndarray], length: int, new: Sequence[int], seeds: Any, numbers: Sequence[int]
  ) -> Prompts:
    """Rows of tokens, padded to a length; ``seeds`` is one for all or one for each."""
    tokens = np.zeros((len(rows), length), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
      padded[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    seeds = np.broadcast_to(np.asarray(seeds, np.uint32), len(rows))
    return cls(tokens, lengths, np.asarray(new, np.int32), seeds, np.asarray(numbers, np.int32))

  def repeated(self, samples: int) -> Prompts:
    """Each row so many times, one after the other, with numbers of their own: as many answers to each prompt."""
    tokens, lengths, new, seeds, numbers = (
      jnp.repeat(jnp.asarray(x), samples, axis=0) for x in dataclasses.astuple(self)
    )
    return Prompts(tokens, lengths, new, seeds, numbers * samples + jnp.arange(numbers.shape[0]) % samples)

  @property
  def keys(self) -> jax.Array:
    """``[B]`` PRNG keys of the rows."""
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(self.seeds, self.numbers)


@struct.dataclass
class DecodeState:
  """A batch in the middle of generation.

  Attributes:
    cache: of everything before ``tokens``.
    tokens: int32 ``[B]``, the newest token of each row, not yet in the cache.
    positions: int32 ``[B]``, the slot that it will take.
    remaining: int32 ``[B]``, how many tokens the row may still add.
    done: bool ``[B]``, whether the row has ended: by an end token, or with none remaining.
    keys: ``[B]`` PRNG keys of the rows.
    log_probs: float32 ``[B]``, of the newest tokens, where the sampler tells them; otherwise zeros.
    unsound: int32 ``[B]``, see `unsound_from`.
    history: the states of the sampler's rules.
  """

  cache: Cache
  tokens: jax.Array
  positions: jax.Array
  remaining: jax.Array
  done: jax.Array
  keys: jax.Array
  log_probs: jax.Array
  unsound: jax.Array
  history: tuple[Tree, ...] = ()

  @classmethod
  def ended(cls, cache: Cache, keys: jax.Array, history: tuple[Tree, ...]) -> DecodeState:
    """Rows that have ended; each array is its own, because a donated state must not hold one twice."""
    zeros = lambda dtype: jnp.zeros(keys.shape[0], dtype)
    return cls(
      cache=cache,
      tokens=zeros(jnp.int32),
      positions=zeros(jnp.int32),
      remaining=zeros(jnp.int32),
      done=~zeros(bool),
      keys=keys,
      log_probs=zeros(jnp.float32),
      unsound=zeros(jnp.int32) + SOUND,
      history=history,
    )


class Drawn(NamedTuple):
  """Tokens that were drawn, and what is told of them.

  Attributes:
    tokens: int32 ``[B, width]``, -1 where there is none.
    log_probs: float32 ``[B, width]``, or None where the sampler does not tell them.
  """

  tokens: Tree
  log_probs: Tree


def newest(tokens: Tree, log_probs: Tree, sampler: Sampler) -> Drawn:
  """The newest token of each row, ``[B, 1]``, of a state's ``tokens`` and ``log_probs``."""
  return Drawn(tokens[:, None], log_probs[:, None] if sampler.log_probs else None)


@program(donate_argnames="state")
def insert(state: DecodeState, rows: DecodeState, slots: jax.Array) -> DecodeState:
  """Puts rows, prefilled into at most as many cache slots, at places int32 ``slots [rows]`` of a batch (donated).

  In a cache of pages they fill those that the rows at ``slots`` have.
  """
  pages = state.cache.pages

  def put(into: jax.Array, new: jax.Array) -> jax.Array:
    return into.at[slots].set(new, unique_indices=True)

  @jax.jit  # traced once for all layers
  def put_slots(into: jax.Array, new: jax.Array) -> jax.Array:
    # What the row before has left would be multiplied by zero, and it may have left NaN.
    into = into.at[slots, :, new.shape[2] :].set(0, unique_indices=True)
    return into.at[slots, :, : new.shape[2]].set(new, unique_indices=True)

  @jax.jit
  def put_pages(into: jax.Array, new: jax.Array, table: jax.Array) -> jax.Array:
    rows, heads, length, width = new.shape
    count, size = -(-length // into.shape[2]), into.shape[2]
    filled = jnp.pad(new, ((0, 0), (0, 0), (0, count * size - length), (0, 0)))
    into = into.at[table[:, count:]].set(0, mode="drop")
    pages = jnp.moveaxis(filled.reshape(rows, heads, count, size, width), 2, 1)
    return into.at[table[:, :count]].set(pages, mode="drop")

  # Not a set: its order is another in every process, and with it the program, which no cache would have.
  names = [field.name for field in dataclasses.fields(state) if field.name != "cache"]
  others = {name: jax.tree.map(put, getattr(state, name), getattr(rows, name)) for name in names}
  write = put_slots if pages is None else lambda into, new: put_pages(into, new, pages.table[slots])
  layers = jax.tree.map(write, state.cache.layers, rows.cache.layers)
  return dataclasses.replace(state, cache=Cache(layers, pages), **others)


@program(donate_argnames="state")
def retire(state: DecodeState, rows: jax.Array) -> DecodeState:
  """Ends the rows that bool ``rows [B]`` names, whatever they were doing."""
  return dataclasses.replace(state, done=state.done | rows)
