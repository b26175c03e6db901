"""The compiled parts of generation: prefill, alone or into a running batch, and the token loop on device."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from sa_jax import ops
from sa_jax.decode.processors import Start
from sa_jax.decode.room import check_room
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.state import DecodeState, Drawn, Prompts, insert, newest
from sa_jax.decode.unsound import unsound_from
from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.programs import program
from sa_jax.sharding import DEFAULT_RULES, Rules, cache_shardings, mesh_of, named_sharding, rules_of, traced_on
from sa_jax.trees import Params, Tree

_LOG = logging.getLogger("sa_jax")

_SHORTEST = 64


@struct.dataclass
class Begun:
  """Beginnings of prompts that have been read already.

  Attributes:
    cache: of one row, which the prompts begin as.
    shared: int32 ``[B]``, how many of each prompt's tokens are read from it; fewer than it has.
    rest: most tokens that a prompt has after them.
  """

  cache: Cache
  shared: Tree
  rest: int = struct.field(pytree_node=False)

  def rows(self, count: int, capacity: int) -> Cache:
    """The cache of so many rows that begin so, in ``capacity`` slots each."""
    cut = lambda x: jnp.broadcast_to(x[:, :, :capacity], (count, *x[0, :, :capacity].shape))
    return jax.tree.map(cut, self.cache).grow(capacity)


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

  def empty(
    self, slots: int, capacity: int, sampler: Sampler = Sampler(), pages: ops.Pages | None = None
  ) -> DecodeState:
    """A batch of rows that have all ended, for `admit` to fill; made in parts where it lies on a mesh.

    Args:
      slots: rows.
      capacity: cache slots a row.
      sampler: how tokens are drawn.
      pages: where the rows lie in a cache of pages, whose size is ``capacity`` over the most of a row.

    Raises:
      UserError: if there is no room for it, or it has pages and lies on a mesh.
    """
    config, plan = self.model.config, self.model.plan
    if pages is not None and self.mesh is not None:
      raise UserError("a cache of pages lies on one device: leave out cache_slots on a mesh")
    shape = (slots, capacity) if pages is None else (len(pages.owners), capacity // pages.table.shape[1])
    check_room(*shape, self.mesh, self.model)

    def make() -> DecodeState:
      cache = dataclasses.replace(Cache.empty(config, plan, *shape), pages=jax.tree.map(jnp.array, pages))
      nothing = jnp.zeros((slots, 1), jnp.int32)
      history = sampler.begin(Start(nothing, nothing[:, 0], capacity + 1, config.vocab_size))
      return DecodeState.ended(cache, jax.random.split(jax.random.key(0), slots), history)

    return make() if self.mesh is None else jax.jit(lambda: self._in_place(make()))()

  def shardings(self, rows: int) -> Tree:
    """A `NamedSharding` for every array of a `DecodeState` on the mesh: rows like the batch.

    Where they do not divide over the mesh, the few numbers that each has besides its cache are on every device.
    """
    assert self.mesh is not None, "only a mesh has shardings"
    numbers: Any = named_sharding(self.mesh, ("batch",), self.rules, (rows,))
    per_row = {field.name: numbers for field in dataclasses.fields(DecodeState) if field.name != "cache"}
    return DecodeState(cache=cache_shardings(self.model, self.mesh, self.rules), **per_row)

  @program(static_argnames=("self", "capacity", "samples"))
  def prefill(
    self,
    params: Params,
    prompts: Prompts,
    *,
    sampler: Sampler,
    capacity: int,
    begun: Begun | None = None,
    samples: int = 1,
  ) -> DecodeState:
    """Reads prompts into a cache of ``capacity`` slots a row, at least T, and draws the first token of each.

    Args:
      params: in the layer layout.
      prompts: what to read.
      sampler: how tokens are drawn.
      capacity: cache slots a row.
      begun: what need not be read again, if anything.
      samples: how many rows continue each prompt, which is read once; see `Prompts.repeated`.
    """
    logits, cache = self._prefilled(params, prompts, begun, capacity)
    if samples > 1:
      prompts = prompts.repeated(samples)
      logits, cache = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), (logits, cache))
    return self._first(sampler, prompts, logits, cache, capacity + 1)

  @program(static_argnames="self", donate_argnames="state")
  def admit(
    self,
    params: Params,
    state: DecodeState,
    slots: jax.Array,
    prompts: Prompts,
    *,
    sampler: Sampler,
    begun: Begun | None = None,
  ) -> tuple[DecodeState, Drawn]:
    """`prefill` of rows and their `insert` at int32 ``slots [rows]``, in one program.

    Returns:
      The batch, and the rows' first tokens ``[rows, 1]``.
    """
    capacity = prompts.tokens.shape[1] if begun is None else state.cache.capacity
    logits, cache = self._prefilled(params, prompts, begun, capacity)
    return self.admitted(state, slots, prompts, (logits, cache), sampler)

  def admitted(
    self,
    state: DecodeState,
    slots: jax.Array,
    prompts: Prompts,
    known: tuple[jax.Array, Cache],
    sampler: Sampler,
  ) -> tuple[DecodeState, Drawn]:
    """The batch with rows at ``slots``, and their first tokens; logits ``[rows, V]`` and cache of prompts are known."""
    logits, cache = known
    rows = self._first(sampler, prompts, logits, cache, state.cache.capacity + 1)
    return self._in_place(insert(state, rows, slots)), newest(rows.tokens, rows.log_probs, sampler)

  def _prefilled(self, params: Params, prompts: Prompts, begun: Begun | None, capacity: int) -> tuple[jax.Array, Cache]:
    """Logits ``[B, V]`` after prompts, and their cache of ``capacity`` slots."""
    _LOG.info("compiling prefill of %s × %s tokens into %s slots", *prompts.tokens.shape, capacity)
    with traced_on(self.mesh, self.rules):
      if begun is not None:
        return self._read_on(params, prompts, begun, capacity)
      logits, cache = apply(self.model, params, Transformer.prefill, prompts.tokens, prompts.lengths)
      return logits, cache.grow(capacity)

  def _first(self, sampler: Sampler, prompts: Prompts, logits: jax.Array, cache: Cache, room: int) -> DecodeState:
    """The state after the first token of each row; rules that keep a row's tokens have room for so many."""
    lengths = jnp.asarray(prompts.lengths)
    start = Start(jnp.asarray(prompts.tokens), lengths, room, self.model.config.vocab_size)
    ended = DecodeState.ended(cache, prompts.keys, sampler.begin(start))
    state = dataclasses.replace(
      ended, positions=lengths, remaining=jnp.asarray(prompts.new) - 1, done=jnp.zeros_like(ended.done)
    )
    return self._in_place(self.drawn(sampler, logits, state))

  def _read_on(self, params: Params, prompts: Prompts, begun: Begun, capacity: int) -> tuple[jax.Array, Cache]:
    """What `Transformer.prefill` gives, of prompts whose beginnings are cached; the cache has ``capacity`` slots."""
    cache = begun.rows(prompts.tokens.shape[0], capacity)
    places = begun.shared[:, None] + jnp.arange(begun.rest)[None]
    tokens = jnp.take_along_axis(prompts.tokens, places, axis=1, mode="clip")
    sight = ops.Rows(jnp.asarray(prompts.lengths), offset=jnp.asarray(begun.shared))
    hidden, cache = apply(self.model, params, Transformer.extend, tokens, cache, sight)
    last = jnp.take_along_axis(hidden, (prompts.lengths - begun.shared - 1)[:, None, None], axis=1)
    return apply(self.model, params, Transformer.logits, last)[:, 0], cache

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
  ) -> tuple[DecodeState, Drawn]:
    """Generates further tokens, stopping early when enough rows have ended.

    Args:
      params: in the layer layout.
      state: donated; the cache needs room for the tokens of rows that have not ended.
      sampler: how tokens are drawn; that of `prefill`.
      steps: most tokens a row; any number up to ``width`` is the same program.
      width: columns of what is returned.
      enough: how many ended rows are enough to stop; all of them when None.

    Returns:
      The state, and what was drawn, ``width`` columns: nothing after a row's end and from ``steps`` on.
    """
    rows = state.tokens.shape[0]
    _LOG.info("compiling up to %s decode steps of %s rows, %s slots each", width, rows, state.cache.capacity)
    enough = rows if enough is None else enough

    def unfinished(carry: tuple[jax.Array, DecodeState, Drawn]) -> jax.Array:
      step, state, _ = carry
      return (step < steps) & (state.done.sum() < enough)

    def one(carry: tuple[jax.Array, DecodeState, Drawn]) -> tuple[jax.Array, DecodeState, Drawn]:
      step, state, out = carry
      logits, cache = apply(self.model, params, Transformer.step, state.tokens, state.cache, state.positions)
      # A row that has ended stays where it is: it rewrites one slot of its own, and its tokens are not recorded.
      stay = lambda old, new: jnp.where(state.done, old, new)
      moved = dataclasses.replace(
        state,
        cache=cache,
        positions=stay(state.positions, state.positions + 1),
        remaining=stay(state.remaining, state.remaining - 1),
      )
      new = self.drawn(sampler, logits, moved)
      record = lambda to, newest, nothing: to.at[:, step].set(jnp.where(state.done, nothing, newest))
      log_probs = None if out.log_probs is None else record(out.log_probs, new.log_probs, jnp.float32(0))
      return step + 1, new, Drawn(record(out.tokens, new.tokens, jnp.int32(-1)), log_probs)

    out = Drawn(
      jnp.full((rows, width), -1, jnp.int32), jnp.zeros((rows, width), jnp.float32) if sampler.log_probs else None
    )
    with traced_on(self.mesh, self.rules):
      _, state, out = jax.lax.while_loop(unfinished, one, (jnp.int32(0), state, out))
    return self._in_place(state), out

  def is_end(self, tokens: jax.Array) -> jax.Array:
    """Which tokens end a row, bool in their shape."""
    return jnp.isin(tokens, jnp.asarray(self.model.config.eos_token_ids, jnp.int32))

  def drawn(self, sampler: Sampler, logits: jax.Array, state: DecodeState) -> DecodeState:
    """The state with each row's next token, of logits ``[B, V]`` at its positions; rows that have ended keep theirs."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.positions)
    tokens = sampler(sampler.processed(logits, state.history), keys)
    ended = self.is_end(tokens) | (state.remaining <= 0)
    stay = lambda old, new: jnp.where(state.done, old, new)
    log_probs = state.log_probs
    if sampler.log_probs:
      log_probs = stay(log_probs, ops.token_log_likelihoods(logits, tokens))
    return dataclasses.replace(
      state,
      tokens=stay(state.tokens, tokens),
      done=state.done | ended,
      log_probs=log_probs,
      unsound=stay(state.unsound, unsound_from(state.unsound, logits, state.positions)),
      history=sampler.after(state.history, tokens),
    )

  def _in_place(self, state: DecodeState) -> DecodeState:
    """The state where the mesh has it: it comes back as it was given, or the next call would compile again."""
    return state if self.mesh is None else jax.lax.with_sharding_constraint(state, self.shardings(len(state.tokens)))
