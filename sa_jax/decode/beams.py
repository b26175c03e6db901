"""Beam search: the likeliest continuations instead of samples."""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from sa_jax.decode.engine import Engine, capacity_for, pad_to
from sa_jax.decode.generate import checked_prompts, pad_token
from sa_jax.decode.room import check_room
from sa_jax.decode.state import Prompts
from sa_jax.distributed import same_call_on_all
from sa_jax.fields import Count, check_fields
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.params import as_layers
from sa_jax.programs import fetch, program
from sa_jax.sharding import mesh_of, traced_on
from sa_jax.trees import Params

_LOG = logging.getLogger("sa_jax")


@dataclasses.dataclass(frozen=True)
class Beams:
  """How to search.

  Attributes:
    width: how many continuations per prompt are kept and returned.
    max_new_tokens: max tokens to add.
    length_penalty: a continuation's score is its log-probability divided by its number of tokens to this power: 0 for
      the total log-probability, 1 for the mean per token.
  """

  width: Count = 4
  max_new_tokens: Count = 24
  length_penalty: float = 1.0

  def __post_init__(self) -> None:
    check_fields(self, "beams")


class Found(NamedTuple):
  """The result of `beam_search`, best first.

  Attributes:
    tokens: int32 ``[B, width, max_new_tokens]``, padding after the end.
    lengths: int32 ``[B, width]``, end tokens included; 0 where there are fewer continuations.
    scores: float32 ``[B, width]``; -inf where there are fewer.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  scores: np.ndarray


@struct.dataclass
class _Ranked:
  """Continuations per prompt, best first: tokens ``[B, W, n]``, lengths ``[B, W]``, scores ``[B, W]``."""

  tokens: jax.Array
  lengths: jax.Array
  scores: jax.Array

  def best(self, width: int) -> _Ranked:
    """The best ``width`` of them, sorted."""
    scores, order = jax.lax.top_k(self.scores, width)
    return _Ranked(_pick(self.tokens, order), _pick(self.lengths, order), scores)

  def with_(self, other: _Ranked) -> _Ranked:
    """These and ``other``, concatenated."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, other)


def _pick(x: jax.Array, order: jax.Array) -> jax.Array:
  """The entries of ``[B, M, …]`` at indices int32 ``[B, W]``."""
  return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


@struct.dataclass
class _Search:
  """The state of a search: unfinished continuations by log-probability, finished ones by score."""

  step: jax.Array
  logits: jax.Array
  cache: Cache
  alive: _Ranked
  ended: _Ranked


@same_call_on_all
def beam_search(
  model: Transformer, params: Params, tokens: ArrayLike, lengths: ArrayLike | None = None, how: Beams = Beams()
) -> Found:
  """The best continuations that a beam search finds (Graves, arXiv 1211.3711).

  A continuation ends with an end token or at ``max_new_tokens``. The search stops when no unfinished continuation could
  still be among the best.

  Args:
    model: from `sa_jax.from_pretrained`, with any plan.
    params: in the layer layout; the run layout needs a second copy of the weights.
    tokens: int ``[B, T]``, right-padded.
    lengths: int ``[B]``; None if rows are full.
    how: width, length and scoring.

  Raises:
    UserError: if a token is not in the vocabulary, a length does not fit, or the cache does not fit in memory.
  """
  prompts, _ = checked_prompts(model, tokens, lengths)
  longest = max(map(len, prompts))
  capacity = capacity_for(longest + how.max_new_tokens)
  check_room(len(prompts) * how.width, capacity, mesh_of(params), model)
  layers = as_layers(params, model.plan)
  batch = Prompts.of(prompts, pad_to(longest, capacity), how.max_new_tokens)
  static = dataclasses.replace(how, length_penalty=0.0)  # one program for all penalties
  penalty = np.float32(how.length_penalty)
  found = fetch(_search(Engine.of(model, layers), layers, batch, penalty, how=static, capacity=capacity))
  there = np.arange(how.max_new_tokens) < found.lengths[:, :, None]
  return Found(np.where(there, found.tokens, pad_token(model)), found.lengths, found.scores)


@program(static_argnames=("engine", "how", "capacity"))
def _search(
  engine: Engine, params: Params, prompts: Prompts, penalty: jax.Array, *, how: Beams, capacity: int
) -> _Ranked:
  rows, width, new = prompts.tokens.shape[0], how.width, how.max_new_tokens
  _LOG.info("compiling a search of %s × %s beams", rows, width)
  ends = len(engine.model.config.eos_token_ids)
  positions = jnp.repeat(jnp.asarray(prompts.lengths), width)

  def none(score: float) -> _Ranked:
    zeros = jnp.zeros((rows, width), jnp.int32)
    return _Ranked(jnp.zeros((rows, width, new), jnp.int32), zeros, jnp.full((rows, width), score, jnp.float32))

  def score(log_probs: jax.Array, length: jax.Array | int) -> jax.Array:
    return log_probs / jnp.asarray(length, jnp.float32) ** penalty

  def undecided(search: _Search) -> jax.Array:
    # An upper bound: log-probabilities only fall, and the score is best at the shortest or the longest length.
    best = search.alive.scores.max(axis=1)
    hope = jnp.maximum(score(best, search.step + 1), score(best, new))
    return (search.step < new) & (hope > search.ended.scores.min(axis=1)).any()

  def one(search: _Search) -> _Search:
    log_probs = jax.nn.log_softmax(search.logits.reshape(rows, width, -1), axis=-1)
    vocab = log_probs.shape[-1]
    total = (search.alive.scores[:, :, None] + log_probs).reshape(rows, width * vocab)
    # Enough for a full beam even if every beam's end tokens rank first.
    scores, order = jax.lax.top_k(total, min(width * (ends + 1), width * vocab))
    beams, chosen = order // vocab, (order % vocab).astype(jnp.int32)
    length = search.step + 1
    grown = _Ranked(
      _pick(search.alive.tokens, beams).at[:, :, search.step].set(chosen), jnp.full(beams.shape, length), scores
    )
    over = engine.is_end(chosen) | (length >= new)
    done = dataclasses.replace(grown, scores=jnp.where(over, score(scores, length), -jnp.inf))
    ended = search.ended.with_(done).best(width)
    going, order = jax.lax.top_k(jnp.where(over, -jnp.inf, scores), min(width, scores.shape[1]))
    short = width - going.shape[1]
    going, order = jnp.pad(going, ((0, 0), (0, short)), constant_values=-jnp.inf), jnp.pad(order, ((0, 0), (0, short)))
    alive = _Ranked(_pick(grown.tokens, order), _pick(grown.lengths, order), going)
    source = (_pick(beams, order) + width * jnp.arange(rows)[:, None]).reshape(-1)
    cache = jax.tree.map(lambda x: jnp.take(x, source, axis=0, mode="clip"), search.cache)
    newest = alive.tokens[:, :, search.step].reshape(-1)
    logits, cache = apply(engine.model, params, Transformer.step, newest, cache, positions + search.step)
    return _Search(length, logits, cache, alive, ended)

  with traced_on(engine.mesh, engine.rules):
    logits, cache = apply(engine.model, params, Transformer.prefill, prompts.tokens, prompts.lengths)
    logits, cache = jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), (logits, cache.grow(capacity)))
    alive = none(-jnp.inf)
    alive = dataclasses.replace(alive, scores=alive.scores.at[:, 0].set(0.0))  # one beam: all are equal
    search = jax.lax.while_loop(undecided, one, _Search(jnp.int32(0), logits, cache, alive, none(-jnp.inf)))
  lengths = jnp.where(jnp.isfinite(search.ended.scores), search.ended.lengths, 0)
  return dataclasses.replace(search.ended, lengths=lengths)
