"""Chunked prefill, so that running rows do not wait for a long prompt."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
from flax import struct

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.decode.engine import CachedPrefixes, Engine
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
  """Partially prefilled prompts, each up to the same number of tokens.

  Attributes:
    prompts: the prompts.
    cache: their cache so far, with a slot for every token. It is not quantised, even if the batch's is: a token then
      sees earlier chunks as in `Engine.prefill`. After a cached prefix it has the prefix's format, as with
      `Engine.admit`.
    last: ``[B, D]``, the head's input at each prompt's last token, once prefilled.
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


def begin(engine: Engine, prompts: Prompts, prefixes: CachedPrefixes | None = None) -> Reading:
  """Prompts of which nothing is prefilled yet, or only their cached prefixes."""
  if prefixes is None:
    return _begin(_plain(engine), prompts, None)
  # `rest` is not used here, and each value would compile another program.
  return _begin(engine, prompts, dataclasses.replace(prefixes, rest=0))


@program(static_argnames="engine")
def _begin(engine: Engine, prompts: Prompts, prefixes: CachedPrefixes | None) -> Reading:
  config, plan = engine.model.config, engine.model.plan
  if prefixes is None:
    cache = Cache.empty(config, plan, *prompts.tokens.shape)
  else:
    cache = prefixes.rows(*prompts.tokens.shape)
  if engine.mesh is not None:
    cache = jax.lax.with_sharding_constraint(cache, cache_shardings(engine.model, engine.mesh, engine.rules))
  return Reading(prompts, cache, jnp.zeros((len(prompts.tokens), config.embed_dim), config.dtype))


@program(static_argnames=("engine", "chunk"), donate_argnames="reading")
def read(engine: Engine, params: Params, reading: Reading, start: jax.Array | int, chunk: int) -> Reading:
  """Prefills one more chunk with decode attention, which materialises weights over all cache slots.

  Args:
    engine: the model's engine.
    params: in the layer layout.
    reading: donated.
    start: int32 ``[]``, tokens of each prompt prefilled so far.
    chunk: how many more to prefill; positions past a prompt's end are padding.
  """
  prompts, start = reading.prompts, jnp.asarray(start, jnp.int32)
  rows, length = prompts.tokens.shape
  _LOG.info("compiling a chunk of %s × %s tokens of prompts of up to %s", rows, chunk, length)
  tokens = jnp.take(jnp.asarray(prompts.tokens), start + jnp.arange(chunk), axis=1, mode="clip")
  visible = ops.Rows(jnp.asarray(prompts.lengths), offset=jnp.full(rows, start))
  with traced_on(engine.mesh, engine.rules):
    model = (_plain(engine) if _is_plain(reading.cache) else engine).model
    hidden, cache = apply(model, params, Transformer.extend, tokens, reading.cache, visible)
  at = (prompts.lengths - 1 - start)[:, None]
  here = jnp.take_along_axis(hidden, at[..., None], axis=1, mode="clip")[:, 0]
  return Reading(prompts, cache, jnp.where((at >= 0) & (at < chunk), here, reading.last))


@program(static_argnames="engine", donate_argnames="state")
def admit_read(
  engine: Engine, params: Params, state: DecodeState, slots: jax.Array, reading: Reading, sampler: Sampler
) -> tuple[DecodeState, Drawn]:
  """`Engine.admit` for prefilled prompts."""
  with traced_on(engine.mesh, engine.rules):
    logits = apply(engine.model, params, Transformer.logits, reading.last[:, None])[:, 0]
  return engine.admitted(state, slots, reading.prompts, (logits, _stored(engine.model.config, reading.cache)), sampler)


def _stored(config: ModelConfig, cache: Cache) -> Cache:
  """The cache in the config's format, from one that may be in the compute dtype."""
  form = config.cache_format
  if form is None or not _is_plain(cache):
    return cache

  def stored(x: ops.Stored | None, rotates: bool) -> ops.Stored:
    assert isinstance(x, jax.Array), "a cache in the compute dtype is of arrays"
    return form.store(ops.hadamard(x) if rotates else x)

  keys = lambda layer: None if layer.keys is None else stored(layer.keys, form.rotates_keys)
  return Cache(tuple(LayerCache(stored(layer.values, False), keys(layer)) for layer in cache.layers))
