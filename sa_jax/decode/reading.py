"""Prompts that are read a chunk at a time, so that running rows do not wait for a long one."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
from flax import struct

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.decode.engine import Begun, Engine
from sa_jax.decode.sampling import Sampler
from sa_jax.decode.state import DecodeState, Drawn, Prompts
from sa_jax.nn import Cache, LayerCache, Transformer
from sa_jax.nn.typed import apply
from sa_jax.programs import program
from sa_jax.sharding import cache_shardings, traced_on
from sa_jax.trees import Params

_LOG = logging.getLogger("sa_jax")


@struct.dataclass
class Reading:
  """Prompts of which a part has been read, the same number of tokens of each.

  Attributes:
    prompts: to be read.
    cache: of what has been read, with a slot for each of their tokens. It is not quantised, whatever the batch's is: a
      token sees those of earlier chunks as `Engine.prefill` shows them. After a beginning it is stored as that is, and
      so are the tokens that `Engine.admit` reads after one.
    last: ``[B, D]``, what the head reads at each prompt's last token, once that has been read.
  """

  prompts: Prompts
  cache: Cache
  last: jax.Array


def _is_plain(cache: Cache) -> bool:
  """Whether a cache is in the compute dtype."""
  return isinstance(cache.layers[0].values, jax.Array)


def _plain(engine: Engine) -> Engine:
  """The engine with a cache in the compute dtype."""
  config = dataclasses.replace(engine.model.config, cache_dtype=None)
  return dataclasses.replace(engine, model=engine.model.clone(config=config))


def begin(engine: Engine, prompts: Prompts, begun: Begun | None = None) -> Reading:
  """Prompts of which nothing has been read, or their beginnings."""
  if begun is None:
    return _begin(_plain(engine), prompts, None)
  # How much is left of a prompt does not matter here, and other programs would be compiled for it.
  return _begin(engine, prompts, dataclasses.replace(begun, rest=0))


@program(static_argnames="engine")
def _begin(engine: Engine, prompts: Prompts, begun: Begun | None) -> Reading:
  config, plan = engine.model.config, engine.model.plan
  if begun is None:
    cache = Cache.empty(config, plan, *prompts.tokens.shape)
  else:
    cache = begun.rows(*prompts.tokens.shape)
  if engine.mesh is not None:
    cache = jax.lax.with_sharding_constraint(cache, cache_shardings(engine.model, engine.mesh, engine.rules))
  return Reading(prompts, cache, jnp.zeros((len(prompts.tokens), config.embed_dim), config.dtype))


@program(static_argnames=("engine", "chunk"), donate_argnames="reading")
def read(engine: Engine, params: Params, reading: Reading, start: jax.Array | int, chunk: int) -> Reading:
  """Reads on; attention is a decode step's, with weights over all slots of the cache in memory.

  Args:
    engine: of the model.
    params: in the layer layout.
    reading: donated.
    start: int32 ``[]``, how many tokens of each prompt have been read.
    chunk: how many more to read; past a prompt's end there is nothing.
  """
  prompts, start = reading.prompts, jnp.asarray(start, jnp.int32)
  rows, length = prompts.tokens.shape
  _LOG.info("compiling a chunk of %s × %s tokens of prompts of up to %s", rows, chunk, length)
  tokens = jnp.take(jnp.asarray(prompts.tokens), start + jnp.arange(chunk), axis=1, mode="clip")
  sight = ops.Rows(jnp.asarray(prompts.lengths), offset=jnp.full(rows, start))
  with traced_on(engine.mesh, engine.rules):
    model = (_plain(engine) if _is_plain(reading.cache) else engine).model
    hidden, cache = apply(model, params, Transformer.extend, tokens, reading.cache, sight)
  at = (prompts.lengths - 1 - start)[:, None]
  here = jnp.take_along_axis(hidden, at[..., None], axis=1, mode="clip")[:, 0]
  return Reading(prompts, cache, jnp.where((at >= 0) & (at < chunk), here, reading.last))


@program(static_argnames="engine", donate_argnames="state")
def admit_read(
  engine: Engine, params: Params, state: DecodeState, slots: jax.Array, reading: Reading, sampler: Sampler
) -> tuple[DecodeState, Drawn]:
  """`Engine.admit` of prompts that have been read."""
  with traced_on(engine.mesh, engine.rules):
    logits = apply(engine.model, params, Transformer.logits, reading.last[:, None])[:, 0]
  return engine.admitted(state, slots, reading.prompts, (logits, _stored(engine.model.config, reading.cache)), sampler)


def _stored(config: ModelConfig, cache: Cache) -> Cache:
  """A cache as the config stores it, of one that may be in the compute dtype."""
  form = config.cache_format
  if form is None or not _is_plain(cache):
    return cache

  def stored(x: ops.Stored | None, rotates: bool) -> ops.Stored:
    assert isinstance(x, jax.Array), "a cache in the compute dtype is of arrays"
    return form.store(ops.hadamard(x) if rotates else x)

  keys = lambda layer: None if layer.keys is None else stored(layer.keys, form.rotates_keys)
  return Cache(tuple(LayerCache(stored(layer.values, False), keys(layer)) for layer in cache.layers))
