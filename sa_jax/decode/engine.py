"""The compiled parts of generation: prefill, and the token loop on device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sa_jax.decode.sampling import Sampler
from sa_jax.nn import Cache, Transformer


@struct.dataclass
class DecodeState:
  """A batch in the middle of generation.

  Attributes:
    cache: of everything before ``tokens``.
    tokens: int32 ``[B]``, the newest token of each row, not yet in the cache.
    positions: int32 ``[B]``, the slot that it will take.
    done: bool ``[B]``, whether the row has ended.
    keys: ``[B]`` PRNG keys of the rows.
  """

  cache: Cache
  tokens: jax.Array
  positions: jax.Array
  done: jax.Array
  keys: jax.Array


def _choose(model: Transformer, sampler: Sampler, logits: jax.Array, positions: jax.Array, keys: jax.Array) -> Any:
  tokens = sampler(logits, jax.vmap(jax.random.fold_in)(keys, positions))
  ends = jnp.asarray(model.config.eos_token_ids, jnp.int32)
  return tokens, (tokens[:, None] == ends[None, :]).any(axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "capacity"))
def prefill(
  model: Transformer,
  sampler: Sampler,
  capacity: int,
  params: Mapping[str, Any],
  tokens: jax.Array,
  lengths: jax.Array,
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
    keys: ``[B]`` PRNG keys.
  """
  logits, cache = model.apply({"params": params}, tokens, lengths, method="prefill")
  grown = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, capacity - x.shape[2]), (0, 0))), cache)
  first, done = _choose(model, sampler, logits, lengths, keys)
  return DecodeState(grown, first, lengths, done, keys)


@functools.partial(jax.jit, static_argnames=("model", "sampler", "steps"), donate_argnames="state")
def decode(
  model: Transformer, sampler: Sampler, steps: int, params: Mapping[str, Any], state: DecodeState
) -> tuple[DecodeState, jax.Array]:
  """Generates up to ``steps`` further tokens a row, stopping early when every row has ended.

  Args:
    model: the model.
    sampler: how tokens are drawn.
    steps: tokens a row.
    params: in the layer layout.
    state: donated; the cache needs room for the tokens of rows that have not ended.

  Returns:
    The state, and int32 ``[B, steps]`` tokens, -1 after a row's end.
  """

  def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
    step, state, _ = carry
    return (step < steps) & ~state.done.all()

  def one(carry: tuple[jax.Array, DecodeState, jax.Array]) -> tuple[jax.Array, DecodeState, jax.Array]:
    step, state, out = carry
    logits, cache = model.apply({"params": params}, state.tokens, state.cache, state.positions, method="step")
    # A row that has ended stays where it is: it rewrites one slot of its own, and its tokens are not recorded.
    positions = jnp.where(state.done, state.positions, state.positions + 1)
    tokens, ended = _choose(model, sampler, logits, positions, state.keys)
    out = out.at[:, step].set(jnp.where(state.done, -1, tokens))
    tokens = jnp.where(state.done, state.tokens, tokens)
    return step + 1, DecodeState(cache, tokens, positions, state.done | ended, state.keys), out

  out = jnp.full((state.tokens.shape[0], steps), -1, jnp.int32)
  if steps == 0:
    return state, out
  _, state, out = jax.lax.while_loop(unfinished, one, (jnp.int32(0), state, out))
  return state, out
