"""The state of a batch during generation, and rows that enter and leave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sa_jax.decode.nonfinite import FINITE
from sa_jax.decode.sampling import Sampler
from sa_jax.nn import Cache
from sa_jax.programs import program
from sa_jax.trees import Tree


@struct.dataclass
class Prompts:
  """Prompts to be continued.

  Attributes:
    tokens: int32 ``[B, T]``, right-padded.
    lengths: int32 ``[B]``.
    new: int32 ``[B]``, max new tokens of each row, at least one.
    seeds: uint32 ``[B]``.
    numbers: int32 ``[B]``, row numbers; a row's samples depend only on its seed and number.
  """

  tokens: Tree
  lengths: Tree
  new: Tree
  seeds: Tree
  numbers: Tree

  @classmethod
  def of(
    cls,
    rows: Sequence[np.ndarray],
    length: int,
    new: int | Sequence[int],
    seeds: int | Sequence[int] = 0,
    numbers: Sequence[int] | None = None,
  ) -> Prompts:
    """Rows of tokens, padded to a length; ``new`` and ``seeds`` are one for all or one per row; numbered from 0."""
    tokens = np.zeros((len(rows), length), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
      padded[: len(row)] = row
    lengths = np.array([len(row) for row in rows], np.int32)
    of_rows = lambda values, dtype: np.broadcast_to(np.asarray(values, dtype), len(rows))
    numbers = range(len(rows)) if numbers is None else numbers
    return cls(tokens, lengths, of_rows(new, np.int32), of_rows(seeds, np.uint32), np.asarray(numbers, np.int32))

  def repeated(self, samples: int) -> Prompts:
    """Each row repeated ``samples`` times in sequence, with distinct numbers: that many answers per prompt."""
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
  """The state of a batch during generation.

  Attributes:
    cache: the cache of everything before ``tokens``.
    tokens: int32 ``[B]``, the newest token of each row, not yet in the cache.
    positions: int32 ``[B]``, the cache slot that it will take.
    remaining: int32 ``[B]``, max further tokens of the row.
    done: bool ``[B]``, whether the row has ended: by an end token, or with none remaining.
    keys: ``[B]`` PRNG keys of the rows.
    log_probs: float32 ``[B]``, of the newest tokens, if the sampler returns them; otherwise zeros.
    nonfinite: int32 ``[B]``, see `nonfinite_from`.
    history: the states of the sampler's rules.
  """

  cache: Cache
  tokens: jax.Array
  positions: jax.Array
  remaining: jax.Array
  done: jax.Array
  keys: jax.Array
  log_probs: jax.Array
  nonfinite: jax.Array
  history: tuple[Tree, ...] = ()

  @classmethod
  def ended(cls, cache: Cache, keys: jax.Array, history: tuple[Tree, ...]) -> DecodeState:
    """Ended rows; no array occurs twice, because the state is donated."""
    zeros = lambda dtype: jnp.zeros(keys.shape[0], dtype)
    return cls(
      cache=cache,
      tokens=zeros(jnp.int32),
      positions=zeros(jnp.int32),
      remaining=zeros(jnp.int32),
      done=~zeros(bool),
      keys=keys,
      log_probs=zeros(jnp.float32),
      nonfinite=zeros(jnp.int32) + FINITE,
      history=history,
    )


class Drawn(NamedTuple):
  """Sampled tokens and their log-probabilities.

  Attributes:
    tokens: int32 ``[B, width]``, -1 where there is none.
    log_probs: float32 ``[B, width]``, or None if the sampler does not return them.
  """

  tokens: Tree
  log_probs: Tree


def newest(tokens: Tree, log_probs: Tree, sampler: Sampler) -> Drawn:
  """Each row's newest token, ``[B, 1]``, from a state's ``tokens`` and ``log_probs``."""
  return Drawn(tokens[:, None], log_probs[:, None] if sampler.log_probs else None)


@program(donate_argnames="state")
def insert(state: DecodeState, rows: DecodeState, slots: jax.Array) -> DecodeState:
  """Inserts rows, prefilled into at most as many cache slots, at int32 ``slots [rows]`` of a batch (donated).

  In a paged cache they fill the pages of the rows at ``slots``.
  """
  pages = state.cache.pages

  def put(into: jax.Array, new: jax.Array) -> jax.Array:
    return into.at[slots].set(new, unique_indices=True)

  @jax.jit  # traced once for all layers
  def put_slots(into: jax.Array, new: jax.Array) -> jax.Array:
    # Clear the rest: the previous row may have left NaN, which multiplied by zero is NaN.
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

  # Not a set: its order differs between processes, which would change the program and miss the compilation cache.
  names = [field.name for field in dataclasses.fields(state) if field.name != "cache"]
  others = {name: jax.tree.map(put, getattr(state, name), getattr(rows, name)) for name in names}
  write = put_slots if pages is None else lambda into, new: put_pages(into, new, pages.table[slots])
  layers = jax.tree.map(write, state.cache.layers, rows.cache.layers)
  return dataclasses.replace(state, cache=Cache(layers, pages), **others)


@program(donate_argnames="state")
def retire(state: DecodeState, rows: jax.Array) -> DecodeState:
  """Ends the rows where bool ``rows [B]`` is True."""
  return dataclasses.replace(state, done=state.done | rows)
