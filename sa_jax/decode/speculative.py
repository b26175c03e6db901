"""Speculative decoding: a cheap draft proposes tokens; the model verifies them in one pass and keeps a prefix.

The draft may use the model's own arrays, under a plan with more followers or with only the first layers.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from sa_jax import ops
from sa_jax.decode.engine import Engine, capacity_for, pad_to
from sa_jax.decode.generate import Generated, checked_prompts
from sa_jax.decode.nonfinite import nonfinite_from, warn_nonfinite
from sa_jax.decode.room import check_room
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.settings import Settings
from sa_jax.decode.state import DecodeState, Drawn, Prompts, newest
from sa_jax.distributed import same_call_on_all
from sa_jax.errors import UserError
from sa_jax.fields import Count, check_fields
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.params import as_layers, prune
from sa_jax.plan import SharingPlan
from sa_jax.programs import fetch, program
from sa_jax.sharding import cache_shardings, mesh_of, traced_on
from sa_jax.trees import Params, Tree

_LOG = logging.getLogger("sa_jax")


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
  """The draft model: any model with the same vocabulary.

  Attributes:
    model: the draft model.
    params: its parameters, in the layer layout; may be arrays of the target model.
    proposals: tokens proposed per round.
    is_beginning: whether it is the first layers of the target model, so that one cache serves both.
  """

  model: Transformer
  params: Params
  proposals: Count = 4
  is_beginning: bool = False

  def __post_init__(self) -> None:
    check_fields(self, "draft")

  @classmethod
  def sharing(cls, model: Transformer, params: Params, plan: SharingPlan | str, proposals: int = 4) -> Draft:
    """The model itself under a plan with more followers, using the same arrays.

    Raises:
      UserError: if the model has no weights for an anchor of the plan.
    """
    if isinstance(plan, str):
      plan = SharingPlan.parse(plan, model.config.num_layers)
    return cls(model.clone(plan=plan), prune(as_layers(params, model.plan), plan), proposals)

  @classmethod
  def early_exit(cls, model: Transformer, params: Params, layers: int, proposals: int = 4) -> Draft:
    """The model's first layers with its final norm and head, using the same arrays.

    Raises:
      UserError: if the model does not have more layers than that.
    """
    if not 0 < layers < model.plan.num_layers:
      raise UserError(f"an early exit must be after 1 to {model.plan.num_layers - 1} layers, not {layers}")
    whole = as_layers(params, model.plan)
    own = {name: value for name, value in whole["layers"].items() if int(name) < layers}
    config = dataclasses.replace(
      model.config, num_layers=layers, local_layers=tuple(each for each in model.config.local_layers if each < layers)
    )
    maps = model.plan.head_map
    plan = SharingPlan(model.plan.source[:layers], None if maps is None else maps[:layers])
    return cls(model.clone(config=config, plan=plan), {**whole, "layers": own}, proposals, is_beginning=True)


@struct.dataclass
class SpeculativeState:
  """A batch in the middle of speculative generation.

  Attributes:
    rows: the model's state.
    cache: the draft's, of everything before the two newest tokens; None if the model's serves both.
    before: int32 ``[B]``, the token before the newest.
    rounds: int32 ``[B]``, verification rounds of each row.
  """

  rows: DecodeState
  cache: Cache | None
  before: jax.Array
  rounds: jax.Array


class _Proposed(NamedTuple):
  """Tokens ``[B, k]``; their distributions ``[B, k, V]``; states of the rules before each and after the last."""

  tokens: jax.Array
  probabilities: jax.Array
  histories: list[tuple[Tree, ...]]


@dataclasses.dataclass(frozen=True)
class SpeculativeEngine:
  """An `Engine` whose rows advance several tokens per model step; ``params`` are the model's and the draft's.

  Attributes:
    engine: the model's.
    draft: the draft's, with the same placement.
    proposals: see `Draft`.
    is_beginning: see `Draft`.
  """

  engine: Engine
  draft: Engine
  proposals: int
  is_beginning: bool = False

  @classmethod
  def of(cls, model: Transformer, params: Params, draft: Draft) -> SpeculativeEngine:
    """The engine for a model and its draft, with the placement of the model's parameters.

    Raises:
      UserError: if their vocabularies differ.
    """
    sizes = model.config.vocab_size, draft.model.config.vocab_size
    if sizes[0] != sizes[1]:
      raise UserError(f"the vocabularies must be equal: the model has {sizes[0]} tokens, the draft {sizes[1]}")
    engine = Engine.of(model, params)
    return cls(engine, dataclasses.replace(engine, model=draft.model), draft.proposals, draft.is_beginning)

  @program(static_argnames=("self", "capacity"))
  def prefill(
    self, params: tuple[Params, Params], prompts: Prompts, *, sampler: Sampler, capacity: int
  ) -> SpeculativeState:
    """Prefills prompts and samples first tokens, like `Engine.prefill`, with room for the proposals."""
    rows = self.engine.prefill(params[0], prompts, sampler=sampler, capacity=capacity)
    cache = None
    if not self.is_beginning:
      with traced_on(self.draft.mesh, self.draft.rules):
        _, cache = apply(self.draft.model, params[1], Transformer.prefill, prompts.tokens, prompts.lengths)
      cache = cache.grow(capacity)
    last = jnp.take_along_axis(jnp.asarray(prompts.tokens), (prompts.lengths - 1)[:, None], axis=1)[:, 0]
    return self._in_place(SpeculativeState(rows, cache, last, jnp.zeros_like(last)))

  @program(static_argnames=("self", "width"), donate_argnames="state")
  def decode(
    self,
    params: tuple[Params, Params],
    state: SpeculativeState,
    *,
    sampler: Sampler,
    width: int,
    rounds: jax.Array | int | None = None,
  ) -> tuple[SpeculativeState, Drawn]:
    """Generates until all rows have ended, or for at most ``rounds``.

    Args:
      params: the model's and the draft's, in the layer layout.
      state: donated; the cache needs room for the tokens of rows that have not ended, and ``proposals`` more.
      sampler: how tokens are sampled; the same as in `prefill`.
      width: columns of the result: at least ``proposals + 1`` per round, or as many as rows may still add.
      rounds: max rounds; None for no limit.

    Returns:
      The state, and the sampled tokens, left-aligned per row.
    """
    batch = state.before.shape[0]
    _LOG.info("compiling speculative steps of %s rows, %s proposals each", batch, self.proposals)
    Carry = tuple[jax.Array, SpeculativeState, jax.Array, Drawn]

    def unfinished(carry: Carry) -> jax.Array:
      return ~carry[1].rows.done.all() & (True if rounds is None else carry[0] < rounds)

    def one(carry: Carry) -> Carry:
      number, state, written, out = carry
      state, new = self._round(params, state, sampler)
      columns = written[:, None] + jnp.arange(self.proposals + 1)[None]
      columns = jnp.where(new.tokens < 0, width, columns)  # out of range: dropped
      write = lambda to, x: to.at[jnp.arange(batch)[:, None], columns].set(x, mode="drop")
      return number + 1, state, written + (new.tokens >= 0).sum(axis=1), jax.tree.map(write, out, new)

    empty = Drawn(
      jnp.full((batch, width), -1, jnp.int32), jnp.zeros((batch, width), jnp.float32) if sampler.log_probs else None
    )
    with traced_on(self.engine.mesh, self.engine.rules):
      start = (jnp.int32(0), state, jnp.zeros(batch, jnp.int32), empty)
      _, state, _, out = jax.lax.while_loop(unfinished, one, start)
    return self._in_place(state), out

  def _round(
    self, params: tuple[Params, Params], state: SpeculativeState, sampler: Sampler
  ) -> tuple[SpeculativeState, Drawn]:
    """Proposes, verifies and accepts; returns the accepted tokens ``[B, proposals + 1]``, left-aligned per row."""
    rows = state.rows
    keys = jax.vmap(lambda key, at: jax.random.split(jax.random.fold_in(key, at), self.proposals + 1))(
      rows.keys, rows.positions
    )
    proposed, state = self._propose(params[1], state, sampler, keys[:, :-1])
    read = jnp.concatenate([rows.tokens[:, None], proposed.tokens], axis=1)
    visible = ops.Rows(rows.positions + self.proposals + 1, offset=rows.positions)
    hidden, cache = apply(self.engine.model, params[0], Transformer.extend, read, state.rows.cache, visible)
    logits = apply(self.engine.model, params[0], Transformer.logits, hidden)
    ruled = [sampler.processed(logits[:, at], history) for at, history in enumerate(proposed.histories)]
    wanted = sampler.probabilities(jnp.concatenate(ruled)).reshape(len(ruled), *ruled[0].shape)
    agreed, own = accept(jnp.moveaxis(wanted, 0, 1), proposed.probabilities, proposed.tokens, keys[:, -1])
    places = jnp.arange(self.proposals + 1)[None]
    tokens = jnp.where(places < agreed[:, None], jnp.pad(proposed.tokens, ((0, 0), (0, 1))), own[:, None])
    ends = self.engine.is_end(tokens)
    ended_before = jnp.cumsum(ends, axis=1) > ends.astype(jnp.int32)
    kept = (places <= agreed[:, None]) & ~ended_before & (places < rows.remaining[:, None]) & ~rows.done[:, None]
    log_probs = jnp.where(kept, ops.token_log_likelihoods(logits, tokens), 0.0) if sampler.log_probs else None
    new = Drawn(jnp.where(kept, tokens, -1), log_probs)
    nonfinite = rows.nonfinite
    for at in range(self.proposals + 1):
      found = nonfinite_from(nonfinite, logits[:, at], rows.positions + 1 + at)
      nonfinite = jnp.where(kept[:, at], found, nonfinite)
    read_on = dataclasses.replace(state, rows=dataclasses.replace(rows, cache=cache, nonfinite=nonfinite))
    return self._advanced(read_on, proposed.histories, new, (ends & kept).any(axis=1), sampler), new

  def _propose(
    self, params: Params, state: SpeculativeState, sampler: Sampler, keys: jax.Array
  ) -> tuple[_Proposed, SpeculativeState]:
    """The draft's next tokens, sampled with keys ``[B, k]``, and the state with its updated cache."""
    rows, model = state.rows, self.draft.model
    if state.cache is None:
      cache = Cache(rows.cache.layers[: model.plan.num_layers])
      logits, cache = apply(model, params, Transformer.step, rows.tokens, cache, rows.positions)
    else:
      # The draft may not have cached the token before: that was its own last proposal.
      pair = jnp.stack([state.before, rows.tokens], axis=1)
      visible = ops.Rows(rows.positions + 1, offset=rows.positions - 1)
      hidden, cache = apply(model, params, Transformer.extend, pair, state.cache, visible)
      logits = apply(model, params, Transformer.logits, hidden[:, 1:])[:, 0]

    def draw(logits: jax.Array, history: tuple[Tree, ...], keys: jax.Array) -> tuple[jax.Array, jax.Array, Tree]:
      logits = sampler.processed(logits, history)
      tokens = sampler(logits, keys)
      return tokens, sampler.probabilities(logits), sampler.after(history, tokens)

    def further(carry: Tree, number_and_keys: tuple[jax.Array, jax.Array]) -> tuple[Tree, Tree]:
      (tokens, cache, history), (number, keys) = carry, number_and_keys
      logits, cache = apply(model, params, Transformer.step, tokens, cache, rows.positions + number)
      tokens, probabilities, history = draw(logits, history, keys)
      return (tokens, cache, history), (tokens, probabilities, history)

    first = draw(logits, rows.history, keys[:, 0])
    numbers = jnp.arange(1, self.proposals)
    (_, cache, _), others = jax.lax.scan(
      further, (first[0], cache, first[2]), (numbers, jnp.moveaxis(keys[:, 1:], 1, 0))
    )
    tokens, probabilities, histories = jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), first, others)
    if state.cache is None:
      whole = Cache((*cache.layers, *rows.cache.layers[model.plan.num_layers :]))
      state = dataclasses.replace(state, rows=dataclasses.replace(rows, cache=whole))
    else:
      state = dataclasses.replace(state, cache=cache)
    at = lambda number: jax.tree.map(lambda x: x[number], histories)
    after = [at(number) for number in range(self.proposals)]
    return _Proposed(jnp.moveaxis(tokens, 0, 1), jnp.moveaxis(probabilities, 0, 1), [rows.history, *after]), state

  def _advanced(
    self,
    state: SpeculativeState,
    histories: list[tuple[Tree, ...]],
    new: Drawn,
    ended: jax.Array,
    sampler: Sampler,
  ) -> SpeculativeState:
    """The state after the tokens accepted in a round; ``histories`` are the rules' states at each proposal."""
    rows, batch = state.rows, jnp.arange(state.before.shape[0])
    count = (new.tokens >= 0).sum(axis=1, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)
    tokens = jnp.where(count > 0, new.tokens[batch, last], rows.tokens)
    before = jnp.where(count > 0, rows.tokens, state.before)
    before = jnp.where(count > 1, new.tokens[batch, jnp.maximum(count - 2, 0)], before)
    history = jax.tree.map(lambda *each: jnp.stack(each)[last, batch], *histories)
    remaining = rows.remaining - count
    rows = dataclasses.replace(
      rows,
      tokens=tokens,
      positions=rows.positions + count,
      remaining=remaining,
      done=rows.done | ended | (remaining <= 0),
      log_probs=rows.log_probs if new.log_probs is None else new.log_probs[batch, last],
      history=sampler.after(history, tokens),
    )
    return SpeculativeState(rows, state.cache, before, state.rounds + (count > 0).astype(jnp.int32))

  def _in_place(self, state: SpeculativeState) -> SpeculativeState:
    """Constrains the state to its shardings; see `Engine`."""
    mesh, rules = self.engine.mesh, self.engine.rules
    if mesh is None:
      return state
    rows = self.engine.shardings(len(state.rows.tokens))
    cache = None if state.cache is None else cache_shardings(self.draft.model, mesh, rules)
    return jax.lax.with_sharding_constraint(state, SpeculativeState(rows, cache, rows.tokens, rows.tokens))


def accept(wanted: jax.Array, proposed: jax.Array, tokens: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How many proposals to accept, so that tokens follow the model's distribution (Leviathan, arXiv 2211.17192).

  A proposal is accepted with probability ``min(1, wanted / proposed)`` of its token. The last accepted one is
  followed by a token of the model's own, sampled from the normalised ``max(wanted - proposed, 0)``, or from ``wanted``
  if all were accepted.

  Args:
    wanted: float32 ``[B, k + 1, V]``, the model's probabilities at each proposal and after the last.
    proposed: float32 ``[B, k, V]``, the distributions that the proposals were sampled from.
    tokens: int32 ``[B, k]``, the proposals.
    keys: ``[B]``.

  Returns:
    int32 ``[B]``, how many are accepted, and ``[B]``, the token after them.
  """
  of_tokens = lambda each: jnp.take_along_axis(each, tokens[:, :, None], axis=2)[:, :, 0]
  draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), tokens.shape[1:]))(keys)
  agrees = draws * of_tokens(proposed) < of_tokens(wanted[:, :-1])
  kept = jnp.cumprod(agrees.astype(jnp.int32), axis=1).sum(axis=1)
  there = lambda each: jnp.take_along_axis(each, kept[:, None, None], axis=1)[:, 0]
  whole = there(wanted)
  left = jnp.maximum(whole - there(jnp.pad(proposed, ((0, 0), (0, 1), (0, 0)))), 0.0)
  # The remainder may be zero if the two differ only by rounding.
  left = jnp.where(left.sum(axis=-1, keepdims=True) > 0, left, whole)
  own = jax.vmap(lambda key, each: jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(each)))(keys, left)
  return kept, own.astype(jnp.int32)


class Speculated(NamedTuple):
  """The result of `speculate`.

  Attributes:
    tokens: int32 ``[B, max_new_tokens]``, padding after a row's end.
    lengths: int32 ``[B]``, new tokens of each row, its end token included.
    log_probs: as in `sa_jax.decode.Generated`.
    rounds: int32 ``[B]``, verification rounds; they produced all tokens except the first.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  log_probs: np.ndarray | None
  rounds: np.ndarray


@same_call_on_all
def speculate(
  model: Transformer,
  params: Params,
  draft: Draft,
  tokens: ArrayLike,
  lengths: ArrayLike | None = None,
  how: Settings = Settings(),
) -> Speculated:
  """Continues prompts like `sa_jax.generate`, with several tokens per model step.

  Greedy tokens equal those of `sa_jax.generate` up to rounding: products over several tokens may be summed in another
  order than for one token, which matters if two tokens are about equally likely. Samples follow the same distribution,
  but are different samples.

  Args:
    model: the target model.
    params: in the layer layout; the run layout needs a second copy of the weights.
    draft: the draft.
    tokens: int ``[B, T]``, right-padded.
    lengths: int ``[B]``; None if rows are full.
    how: how many tokens to generate, and how they are sampled.

  Raises:
    UserError: see `sa_jax.generate`.
  """
  prompts, counts = checked_prompts(model, np.asarray(tokens), lengths)
  how.sampler.check(model.config.vocab_size)
  capacity = capacity_for(int(counts.max()) + how.max_new_tokens + draft.proposals)
  check_room(len(prompts), capacity, mesh_of(params), model, *(() if draft.is_beginning else (draft.model,)))
  layers = as_layers(params, model.plan)
  engine = SpeculativeEngine.of(model, layers, draft)
  batch = Prompts.of(prompts, pad_to(int(counts.max()), capacity), how.max_new_tokens, how.seed)
  both = layers, draft.params
  state = engine.prefill(both, batch, sampler=how.sampler, capacity=capacity)
  tokens, log_probs = fetch((state.rows.tokens, state.rows.log_probs))  # before the state is donated
  first = newest(tokens, log_probs, how.sampler)
  state, rest = engine.decode(both, state, sampler=how.sampler, width=pad_to(how.max_new_tokens, capacity))
  rest, rounds, nonfinite = fetch((rest, state.rounds, state.rows.nonfinite))
  warn_nonfinite(nonfinite, counts.tolist(), range(len(prompts)))
  join = lambda one, more: np.concatenate([one, more], axis=1)[:, : how.max_new_tokens]
  drawn = Drawn(*jax.tree.map(join, first, rest))
  out = Generated.of(model, drawn)
  return Speculated(*out, rounds)
