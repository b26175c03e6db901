"""The compiled parts of generation: prefill, the token loop on device, and putting a prefilled row into a batch."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from sa_jax.decode.sampling import Sampler
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.sharding import cache_shardings, named_sharding

_LOG = logging.getLogger("sa_jax")

_SHORTEST_BUCKET = 64


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
  """

  cache: Cache
  tokens: jax.Array
  positions: jax.Array
  remaining: jax.Array
  done: jax.Array
  keys: jax.Array

  @classmethod
  def empty(cls, model: Transformer, slots: int, capacity: int, mesh: Mesh | None = None) -> DecodeState:
    """A batch of rows that have all ended, for `insert` to fill; made in parts where it lies on a mesh."""

    def make() -> DecodeState:
      cache = Cache.empty(model.config, model.plan, slots, capacity)
      # Three arrays, not one three times: the state is donated, and a buffer can be donated only once.
      tokens, positions, remaining = (jnp.zeros(slots, jnp.int32) for _ in range(3))
      return cls(cache, tokens, positions, remaining, jnp.ones(slots, bool), row_keys(0, range(slots)))

    if mesh is None:
      return make()
    rows: Any = named_sharding(mesh, ("batch",))
    shardings = cls(cache_shardings(model, mesh), rows, rows, rows, rows, rows)
    return jax.jit(make, out_shardings=shardings)()


def row_keys(seeds: Any, rows: Any) -> jax.Array:
  """A PRNG key for each row number, from a seed for all or one for each; it depends on nothing else."""
  rows = np.asarray(rows)
  return _row_keys(np.broadcast_to(np.asarray(seeds), rows.shape), rows)


@jax.jit
def _row_keys(seeds: jax.Array, rows: jax.Array) -> jax.Array:
  return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, rows)


def bucket(length: int, longest: int) -> int:
  """The length a prompt is padded to, so that few programs are compiled: a power of two from 64 on, or ``longest``."""
  size = _SHORTEST_BUCKET
  while size < length:
    size *= 2
  return min(size, longest)


def capacity_for(slots: int) -> int:
  """Cache slots for a row that needs so many, in steps: kernels read blocks of 64, and few programs are compiled.

  Kernels split a row into equal parts, and 64 times an odd number has none longer than 64: above 2048 slots, steps are
  a 16th to a 32nd of the slots.
  """
  step = max(64, (1 << (slots - 1).bit_length()) // 32)
  return -(-slots // step) * step


def _choose(
  model: Transformer, sampler: Sampler, logits: jax.Array, positions: jax.Array, remaining: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The next token of each row, and whether it ends the row."""
  tokens = sampler(logits, jax.vmap(jax.random.fold_in)(keys, positions))
  ends = jnp.asarray(model.config.eos_token_ids, jnp.int32)
  return tokens, (tokens[:, None] == ends[None, :]).any(axis=-1) | (remaining <= 0)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "capacity"))
def prefill(
  model: Transformer,
  sampler: Sampler,
  capacity: int,
  params: Mapping[str, Any],
  tokens: jax.Array,
  lengths: jax.Array,
  remaining: jax.Array,
  keys: jax.Array,
) -> DecodeState:
  """Reads prompts and draws the first token of each.

  Args:
    model: the model.
    sampler: how tokens are drawn.
    capacity: slots a row of the cache, at least T.
    params: in the layer layout.
    tokens: int32 ``[B, T]``, right-padded.
    lengths: int32 ``[B]``.
    remaining: int32 ``[B]``, how many tokens each row may add after the first.
    keys: ``[B]`` PRNG keys.
  """
  _LOG.info("compiling prefill of %s × %s tokens into %s slots", *tokens.shape, capacity)
  logits, cache = apply(model, params, Transformer.prefill, tokens, lengths)
  grown = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, capacity - x.shape[2]), (0, 0))), cache)
  first, done = _choose(model, sampler, logits, lengths, remaining, keys)
  return DecodeState(grown, first, lengths, remaining, done, keys)


@functools.partial(jax.jit, donate_argnames="state")
def insert(state: DecodeState, rows: DecodeState, slots: jax.Array) -> DecodeState:
  """Puts rows, prefilled into at most as many cache slots, at places int32 ``slots [rows]`` of a batch (donated)."""

  def put(into: jax.Array, new: jax.Array) -> jax.Array:
    if new.ndim == 4:
      # What the row before has left would be multiplied by zero, and it may have left NaN.
      into = into.at[slots, :, new.shape[2] :].set(0, unique_indices=True)
      return into.at[slots, :, : new.shape[2]].set(new, unique_indices=True)
    return into.at[slots].set(new, unique_indices=True)

  return jax.tree.map(put, state, rows)


@functools.partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames="state")
def admit(
  model: Transformer,
  sampler: Sampler,
  params: Mapping[str, Any],
  state: DecodeState,
  slots: jax.Array,
  tokens: jax.Array,
  lengths: jax.Array,
  remaining: jax.Array,
  seeds: jax.Array,
  numbers: jax.Array,
) -> tuple[DecodeState, jax.Array]:
  """`row_keys` of int ``seeds`` and row ``numbers [rows]``, `prefill` of the rows, and their `insert`, in one program.

  Returns:
    The batch, and the rows' first tokens ``[rows]``.
  """
  keys = _row_keys(seeds, numbers)
  rows = prefill(model, sampler, tokens.shape[1], params, tokens, lengths, remaining, keys)
  return insert(state, rows, slots), rows.tokens


@functools.partial(jax.jit, donate_argnames="state")
def retire(state: DecodeState, rows: jax.Array) -> DecodeState:
  """Ends the rows that bool ``rows [B]`` names, whatever they were doing."""
  return dataclasses.replace(state, done=state.done | rows)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "steps"), donate_argnames="state")
def decode(
  model: Transformer,
  sampler: Sampler,
  steps: int,
  params: Mapping[str, Any],
  state: DecodeState,
  ended: jax.Array | None = None,
) -> tuple[DecodeState, jax.Array]:
  """Generates up to ``steps`` further tokens a row, stopping early when enough rows have ended.

  Args:
    model: the model.
    sampler: how tokens are drawn.
    steps: tokens a row.
    params: in the layer layout.
    state: donated; the cache needs room for the tokens of rows that have not ended.
    ended: int32 ``[]``, how many ended rows are enough to stop; all of them when None.

  Returns:
    The state, and int32 ``[B, steps]`` tokens, -1 after a row's end.
  """
  _LOG.info("compiling %s decode steps of %s rows, %s slots each", steps, state.tokens.shape[0], state.cache.capacity)
  enough = state.done.size if ended is None else ended

  def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
    step, state, _ = carry
    return (step < steps) & (state.done.sum() < enough)

  def one(carry: tuple[jax.Array, DecodeState, jax.Array]) -> tuple[jax.Array, DecodeState, jax.Array]:
    step, state, out = carry
    logits, cache = apply(model, params, Transformer.step, state.tokens, state.cache, state.positions)
    # A row that has ended stays where it is: it rewrites one slot of its own, and its tokens are not recorded.
    stay = lambda old, new: jnp.where(state.done, old, new)
    positions = stay(state.positions, state.positions + 1)
    remaining = stay(state.remaining, state.remaining - 1)
    tokens, ends = _choose(model, sampler, logits, positions, remaining, state.keys)
    out = out.at[:, step].set(stay(jnp.full_like(tokens, -1), tokens))
    tokens = stay(state.tokens, tokens)
    return step + 1, DecodeState(cache, tokens, positions, remaining, state.done | ends, state.keys), out

  out = jnp.full((state.tokens.shape[0], steps), -1, jnp.int32)
  if steps == 0:
    return state, out
  _, state, out = jax.lax.while_loop(unfinished, one, (jnp.int32(0), state, out))
  return state, out
