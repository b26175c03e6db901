"""The compiled programs of generation: prefill, alone or into a running batch, and the token loop on device."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from sa_jax import ops
from sa_jax.decode.nonfinite import nonfinite_from
from sa_jax.decode.processors import Start
from sa_jax.decode.room import check_room
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.state import DecodeState, Drawn, Prompts, insert, newest
from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.programs import program
from sa_jax.sharding import DEFAULT_RULES, Rules, cache_shardings, mesh_of, named_sharding, rules_of, traced_on
from sa_jax.trees import Params, Tree

_LOG = logging.getLogger("sa_jax")

_SHORTEST = 64


@struct.dataclass
class CachedPrefixes:
  """Prompts' prefixes that are already cached.

  Attributes:
    cache: one row's cache, whose tokens the prompts share at their start.
    shared: int32 ``[B]``, how many tokens of each prompt come from it; fewer than the prompt has.
    rest: max tokens of a prompt after those.
  """

  cache: Cache
  shared: Tree
  rest: int = struct.field(pytree_node=False)

  def rows(self, count: int, capacity: int) -> Cache:
    """The cache repeated for ``count`` rows, with ``capacity`` slots each."""
    cut = lambda x: jnp.broadcast_to(x[:, :, :capacity], (count, *x[0, :, :capacity].shape))
    return jax.tree.map(cut, self.cache).grow(capacity)


def pad_to(length: int, longest: int) -> int:
  """The padded length of rows, so that few programs are compiled: a power of two ≥ 64, at most ``longest``."""
  size = _SHORTEST
  while size < length:
    size *= 2
  return min(size, longest)


def capacity_for(slots: int) -> int:
  """Rounds up a row's cache slots: kernels read blocks of 64, and few programs are compiled.

  Kernels split a row into equal parts, and 64 times an odd number has none longer than 64. So above 2048 slots, the
  step is a 16th to a 32nd of the slots.
  """
  step = max(64, (1 << (slots - 1).bit_length()) // 32)
  return -(-slots // step) * step


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model for generation, and the placement of its arrays. Programs are compiled once for all equal engines.

  Attributes:
    model: the model; every method takes its parameters in the layer layout.
    mesh: the parameters' mesh; None on one device.
    rules: logical axis → mesh axis.
  """

  model: Transformer
  mesh: Mesh | None = None
  rules: Rules = DEFAULT_RULES

  @classmethod
  def of(cls, model: Transformer, params: Params) -> Engine:
    """The engine for a model, with its parameters' placement."""
    mesh = mesh_of(params)
    return cls(model) if mesh is None else cls(model, mesh, rules_of(model.config, params, mesh))

  def empty(
    self, slots: int, capacity: int, sampler: Sampler = Sampler(), pages: ops.Pages | None = None
  ) -> DecodeState:
    """A batch of ended rows, for `admit` to fill; created sharded if on a mesh.

    Args:
      slots: number of rows.
      capacity: cache slots per row.
      sampler: how tokens are sampled.
      pages: the page table of a paged cache; the page size is ``capacity`` divided by the max pages of a row.

    Raises:
      UserError: if it does not fit in memory, or is paged on a mesh.
    """
    config, plan = self.model.config, self.model.plan
    if pages is not None and self.mesh is not None:
      raise UserError("a paged cache cannot be sharded: leave out cache_slots on a mesh")
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

    If rows do not divide over the mesh, per-row values other than the cache are replicated.
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
    prefixes: CachedPrefixes | None = None,
    samples: int = 1,
  ) -> DecodeState:
    """Prefills prompts into a cache of ``capacity`` slots per row, at least T, and samples the first tokens.

    Args:
      params: in the layer layout.
      prompts: the prompts.
      sampler: how tokens are sampled.
      capacity: cache slots per row.
      prefixes: cached prefixes, if any.
      samples: how many rows continue each prompt, which is prefilled once; see `Prompts.repeated`.
    """
    logits, cache = self._prefilled(params, prompts, prefixes, capacity)
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
    prefixes: CachedPrefixes | None = None,
  ) -> tuple[DecodeState, Drawn]:
    """`prefill` and `insert` at int32 ``slots [rows]``, in one program.

    Returns:
      The batch, and the rows' first tokens ``[rows, 1]``.
    """
    capacity = prompts.tokens.shape[1] if prefixes is None else state.cache.capacity
    logits, cache = self._prefilled(params, prompts, prefixes, capacity)
    return self.admitted(state, slots, prompts, (logits, cache), sampler)

  def admitted(
    self,
    state: DecodeState,
    slots: jax.Array,
    prompts: Prompts,
    known: tuple[jax.Array, Cache],
    sampler: Sampler,
  ) -> tuple[DecodeState, Drawn]:
    """The batch with rows at ``slots``, and their first tokens; ``known`` has logits ``[rows, V]`` and cache."""
    logits, cache = known
    rows = self._first(sampler, prompts, logits, cache, state.cache.capacity + 1)
    return self._in_place(insert(state, rows, slots)), newest(rows.tokens, rows.log_probs, sampler)

  def _prefilled(
    self, params: Params, prompts: Prompts, prefixes: CachedPrefixes | None, capacity: int
  ) -> tuple[jax.Array, Cache]:
    """Logits ``[B, V]`` after the prompts, and their cache of ``capacity`` slots."""
    _LOG.info("compiling prefill of %s × %s tokens into %s slots", *prompts.tokens.shape, capacity)
    with traced_on(self.mesh, self.rules):
      if prefixes is not None:
        return self._prefill_rest(params, prompts, prefixes, capacity)
      logits, cache = apply(self.model, params, Transformer.prefill, prompts.tokens, prompts.lengths)
      return logits, cache.grow(capacity)

  def _first(self, sampler: Sampler, prompts: Prompts, logits: jax.Array, cache: Cache, room: int) -> DecodeState:
    """The state after each row's first token; rules that store a row's tokens have room for ``room`` of them."""
    lengths = jnp.asarray(prompts.lengths)
    start = Start(jnp.asarray(prompts.tokens), lengths, room, self.model.config.vocab_size)
    ended = DecodeState.ended(cache, prompts.keys, sampler.begin(start))
    state = dataclasses.replace(
      ended, positions=lengths, remaining=jnp.asarray(prompts.new) - 1, done=jnp.zeros_like(ended.done)
    )
    return self._in_place(self.drawn(sampler, logits, state))

  def _prefill_rest(
    self, params: Params, prompts: Prompts, prefixes: CachedPrefixes, capacity: int
  ) -> tuple[jax.Array, Cache]:
    """`Transformer.prefill` for prompts whose prefixes are cached; the cache has ``capacity`` slots."""
    cache = prefixes.rows(prompts.tokens.shape[0], capacity)
    places = prefixes.shared[:, None] + jnp.arange(prefixes.rest)[None]
    tokens = jnp.take_along_axis(prompts.tokens, places, axis=1, mode="clip")
    visible = ops.Rows(jnp.asarray(prompts.lengths), offset=jnp.asarray(prefixes.shared))
    hidden, cache = apply(self.model, params, Transformer.extend, tokens, cache, visible)
    last = jnp.take_along_axis(hidden, (prompts.lengths - prefixes.shared - 1)[:, None, None], axis=1)
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
      sampler: how tokens are sampled; the same as in `prefill`.
      steps: max tokens per row; any number up to ``width`` uses the same program.
      width: columns of the result.
      enough: how many ended rows stop the loop; None for all.

    Returns:
      The state, and the sampled tokens in ``width`` columns: -1 after a row's end and from ``steps`` on.
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
      # An ended row stays where it is: it rewrites one of its slots, and its tokens are not recorded.
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
    """Which tokens end a row, bool of the same shape."""
    return jnp.isin(tokens, jnp.asarray(self.model.config.eos_token_ids, jnp.int32))

  def drawn(self, sampler: Sampler, logits: jax.Array, state: DecodeState) -> DecodeState:
    """Samples each row's next token from logits ``[B, V]``; ended rows keep theirs."""
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
      nonfinite=stay(state.nonfinite, nonfinite_from(state.nonfinite, logits, state.positions)),
      history=sampler.after(state.history, tokens),
    )

  def _in_place(self, state: DecodeState) -> DecodeState:
    """Constrains the state to its shardings: if they changed, the next call would recompile."""
    return state if self.mesh is None else jax.lax.with_sharding_constraint(state, self.shardings(len(state.tokens)))
