"""The compiled parts of generation: prefill, the token loop on device, and putting a prefilled row into a batch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from sa_jax.decode.sampling import Sampler
from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.programs import program
from sa_jax.sharding import DEFAULT_RULES, Rules, cache_shardings, mesh_of, named_sharding, rules_of, traced_on
from sa_jax.trees import Params, Tree

_LOG = logging.getLogger("sa_jax")

_SHORTEST = 64


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
  """

  cache: Cache
  tokens: jax.Array
  positions: jax.Array
  remaining: jax.Array
  done: jax.Array
  keys: jax.Array


def check_seed(seed: int) -> None:
  """Checks a seed of samples.

  Raises:
    UserError: if it is not an integer of 32 bits.
  """
  if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 32:
    raise UserError(f"a seed is an integer in 0 to {(1 << 32) - 1}, not {seed!r}")


def pad_to(length: int, longest: int) -> int:
  """The length that rows are padded to, so that few programs are compiled: a power of two ≥ 64, or ``longest``."""
  size = _SHORTEST
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


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model that generates, and where its arrays lie. Its programs are compiled once for all engines that are equal.

  Attributes:
    model: with parameters in the layer layout, which every method takes.
    mesh: what the parameters lie on; None on one device.
    rules: logical axis → mesh axis.
  """

  model: Transformer
  mesh: Mesh | None = None
  rules: Rules = DEFAULT_RULES

  @classmethod
  def of(cls, model: Transformer, params: Params) -> Engine:
    """The engine of a model where its parameters are."""
    mesh = mesh_of(params)
    return cls(model) if mesh is None else cls(model, mesh, rules_of(model.config, params, mesh))

  def empty(self, slots: int, capacity: int) -> DecodeState:
    """A batch of rows that have all ended, for `admit` to fill; made in parts where it lies on a mesh."""
    config, plan = self.model.config, self.model.plan

    def make() -> DecodeState:
      # Three arrays, not one three times: the state is donated, and a buffer can be donated only once.
      tokens, positions, remaining = (jnp.zeros(slots, jnp.int32) for _ in range(3))
      keys = jax.random.split(jax.random.key(0), slots)
      return DecodeState(
        Cache.empty(config, plan, slots, capacity), tokens, positions, remaining, jnp.ones(slots, bool), keys
      )

    return make() if self.mesh is None else jax.jit(lambda: self._in_place(make()))()

  def shardings(self) -> Tree:
    """A `NamedSharding` for every array of a `DecodeState` on the mesh: rows like the batch."""
    assert self.mesh is not None, "only a mesh has shardings"
    rows: Any = named_sharding(self.mesh, ("batch",), self.rules)
    return DecodeState(cache_shardings(self.model, self.mesh, self.rules), rows, rows, rows, rows, rows)

  @program(static_argnames=("self", "capacity"))
  def prefill(self, params: Params, prompts: Prompts, *, sampler: Sampler, capacity: int) -> DecodeState:
    """Reads prompts into a cache of ``capacity`` slots a row, at least T, and draws the first token of each."""
    _LOG.info("compiling prefill of %s × %s tokens into %s slots", *prompts.tokens.shape, capacity)
    with traced_on(self.mesh, self.rules):
      logits, cache = apply(self.model, params, Transformer.prefill, prompts.tokens, prompts.lengths)
    keys, remaining = prompts.keys, prompts.new - 1
    first, done = self._choose(sampler, logits, prompts.lengths, remaining, keys)
    return self._in_place(DecodeState(cache.grow(capacity), first, prompts.lengths, remaining, done, keys))

  @program(static_argnames="self", donate_argnames="state")
  def admit(
    self, params: Params, state: DecodeState, slots: jax.Array, prompts: Prompts, *, sampler: Sampler
  ) -> tuple[DecodeState, jax.Array]:
    """`prefill` of rows and their `insert` at int32 ``slots [rows]``, in one program.

    Returns:
      The batch, and the rows' first tokens ``[rows]``.
    """
    rows = self.prefill(params, prompts, sampler=sampler, capacity=prompts.tokens.shape[1])
    return self._in_place(insert(state, rows, slots)), rows.tokens

  @program(static_argnames=("self", "width"), donate_argnames="state")
  def decode(
    self,
    params: Params,
    state: DecodeState,
    *,
    sampler: Sampler,
    steps: jax.Array | int,
    width: int,
    enough: jax.Array | int | None = None,
  ) -> tuple[DecodeState, jax.Array]:
    """Generates further tokens, stopping early when enough rows have ended.

    Args:
      params: in the layer layout.
      state: donated; the cache needs room for the tokens of rows that have not ended.
      sampler: how tokens are drawn.
      steps: most tokens a row; any number up to ``width`` is the same program.
      width: columns of what is returned.
      enough: how many ended rows are enough to stop; all of them when None.

    Returns:
      The state, and int32 ``[B, width]`` tokens, -1 after a row's end and from ``steps`` on.
    """
    rows = state.tokens.shape[0]
    _LOG.info("compiling up to %s decode steps of %s rows, %s slots each", width, rows, state.cache.capacity)
    enough = rows if enough is None else enough

    def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
      step, state, _ = carry
      return (step < steps) & (state.done.sum() < enough)

    def one(carry: tuple[jax.Array, DecodeState, jax.Array]) -> tuple[jax.Array, DecodeState, jax.Array]:
      step, state, out = carry
      logits, cache = apply(self.model, params, Transformer.step, state.tokens, state.cache, state.positions)
      # A row that has ended stays where it is: it rewrites one slot of its own, and its tokens are not recorded.
      stay = lambda old, new: jnp.where(state.done, old, new)
      positions = stay(state.positions, state.positions + 1)
      remaining = stay(state.remaining, state.remaining - 1)
      tokens, ends = self._choose(sampler, logits, positions, remaining, state.keys)
      out = out.at[:, step].set(stay(jnp.full_like(tokens, -1), tokens))
      tokens = stay(state.tokens, tokens)
      return step + 1, DecodeState(cache, tokens, positions, remaining, state.done | ends, state.keys), out

    out = jnp.full((rows, width), -1, jnp.int32)
    with traced_on(self.mesh, self.rules):
      _, state, out = jax.lax.while_loop(unfinished, one, (jnp.int32(0), state, out))
    return self._in_place(state), out

  def _in_place(self, state: DecodeState) -> DecodeState:
    """The state where the mesh has it: it comes back as it was given, or the next call would compile again."""
    return state if self.mesh is None else jax.lax.with_sharding_constraint(state, self.shardings())

  def _choose(
    self, sampler: Sampler, logits: jax.Array, positions: jax.Array, remaining: jax.Array, keys: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, and whether it ends the row."""
    tokens = sampler(logits, jax.vmap(jax.random.fold_in)(keys, positions))
    ends = jnp.asarray(self.model.config.eos_token_ids, jnp.int32)
    return tokens, (tokens[:, None] == ends[None, :]).any(axis=-1) | (remaining <= 0)


@program(donate_argnames="state")
def insert(state: DecodeState, rows: DecodeState, slots: jax.Array) -> DecodeState:
  """Puts rows, prefilled into at most as many cache slots, at places int32 ``slots [rows]`` of a batch (donated)."""

  def put(into: jax.Array, new: jax.Array) -> jax.Array:
    if new.ndim == 4:
      # What the row before has left would be multiplied by zero, and it may have left NaN.
      into = into.at[slots, :, new.shape[2] :].set(0, unique_indices=True)
      return into.at[slots, :, : new.shape[2]].set(new, unique_indices=True)
    return into.at[slots].set(new, unique_indices=True)

  return jax.tree.map(put, state, rows)


@program(donate_argnames="state")
def retire(state: DecodeState, rows: jax.Array) -> DecodeState:
  """Ends the rows that bool ``rows [B]`` names, whatever they were doing."""
  return dataclasses.replace(state, done=state.done | rows)
