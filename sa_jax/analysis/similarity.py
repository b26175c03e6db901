"""Similarity of the attention weights between a model's layers, and their entropy and variance.

All results are sums over queries, so text is streamed row by row and each row in blocks of queries: memory holds the
weights of one block, ``[L, B, N, block, T]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from numpy.typing import ArrayLike

from sa_jax.display import Progress, maps_picture
from sa_jax.distributed import same_call_on_all
from sa_jax.errors import UserError
from sa_jax.nn import Transformer
from sa_jax.nn.state import QueryKey, State
from sa_jax.nn.transformer import check_tokens
from sa_jax.nn.typed import apply
from sa_jax.params import as_layers
from sa_jax.programs import fetch_each, program
from sa_jax.sharding import traced_where_parameters_are
from sa_jax.trees import Params

_Array = TypeVar("_Array", jax.Array, np.ndarray)


class Similarity(NamedTuple):
  """All pairs of layers compared per head (head ``n`` of one with head ``n`` of the other), over all queries.

  Attributes:
    cosine: float64 ``[L, L, N]``, of two layers' weights as vectors (Liao & Vargas, arXiv 2407.12866).
    cosine_without_sink: the same without the weights on the first key, the attention sink of all layers.
    js_divergence: Jensen-Shannon divergence of two layers' weights in nats (0 identical, log 2 disjoint), mean over
      queries.
    top_k_overlap: the fraction of a query's k keys with the largest weights that two layers have in common; mean over
      the queries that see at least k keys in both.
    entropy: ``[L, N]``, of the weights in nats, mean over queries; learned sinks (`sa_jax.ops.Rows.sinks`) are
      excluded, so that weights sum to less than 1.
    weighted_variance: ``[L, N]``, the variance of a query's weights over its visible keys (their mean is 1 / number of
      keys), averaged over queries, weighted by that number.
  """

  cosine: np.ndarray
  cosine_without_sink: np.ndarray
  js_divergence: np.ndarray
  top_k_overlap: np.ndarray
  entropy: np.ndarray
  weighted_variance: np.ndarray

  def mean(self) -> Similarity:
    """Averaged over heads: ``[L, L]`` and ``[L]``."""
    return Similarity(*(values.mean(axis=-1) for values in self))

  def _repr_html_(self) -> str:
    """The cosine maps as pictures, averaged over heads, for notebooks."""
    maps = {"cosine": self.cosine, "cosine without the first key": self.cosine_without_sink}
    return maps_picture(
      [(title, values.mean(axis=-1) if values.ndim == 3 else values) for title, values in maps.items()]
    )


@same_call_on_all
@traced_where_parameters_are
def layer_similarity(
  model: Transformer,
  params: Params,
  tokens: ArrayLike,
  *,
  top_k: int = 8,
  block: int = 64,
  progress: Progress | None = None,
) -> Similarity:
  """Compares the attention weights of every pair of layers.

  Args:
    model: under any plan; followers use their anchor's weights.
    params: in either layout.
    tokens: int ``[rows, T]``, rows without padding, each independent.
    top_k: for `Similarity.top_k_overlap`.
    block: queries per block; O(L N block T) memory.
    progress: called with (rows done, total rows).

  Raises:
    UserError: if a token is not in the vocabulary, rows are shorter than ``top_k``, or ``block`` is not positive.
  """
  tokens = np.asarray(tokens)
  check_tokens(tokens, None, model.config.vocab_size)
  if not 1 <= top_k <= tokens.shape[1]:
    raise UserError(f"top_k must be in 1 to {tokens.shape[1]}, the tokens of a row, not {top_k}")
  if block < 1:
    raise UserError(f"block must be at least 1, not {block}")
  model = model.clone(config=dataclasses.replace(model.config, attention_state="query_key"))
  layers = as_layers(params, model.plan)
  block = min(block, tokens.shape[1])
  starts = range(0, tokens.shape[1], block)

  def parts() -> Iterator[_Sums[jax.Array]]:
    for row in tokens:
      states = _states(model, layers, row[None].astype(np.int32))
      yield from (block_sums(states, start, tokens.shape[1], top_k, block) for start in starts)

  total: _Sums[np.ndarray] | None = None
  for done, part in enumerate(fetch_each(parts()), 1):
    sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
    total = sums if total is None else jax.tree.map(np.add, total, sums)
    if progress is not None and done % len(starts) == 0:
      progress(done // len(starts), len(tokens))
  assert total is not None
  return _finish(total)


class _Sums(NamedTuple, Generic[_Array]):
  """Sums over queries: ``[L, L, N]`` and ``[L, N]``; those common to all heads ``[L, L]``, ``[L]`` or scalar."""

  products: _Array
  sink_products: _Array
  divergence: _Array
  overlap: _Array
  entropy: _Array
  queries: _Array
  long_queries: _Array
  keys: _Array
  inverse_keys: _Array


@program(static_argnames="model")
def _states(model: Transformer, layers: Params, tokens: jax.Array) -> tuple[State, ...]:
  return apply(model, layers, Transformer.states, tokens)


@program(static_argnames=("length", "top_k", "block"))
def block_sums(
  states: tuple[State, ...], start: jax.Array | int, length: int, top_k: int, block: int
) -> _Sums[jax.Array]:
  """The contribution of a block of queries, ``start`` to ``start + block``.

  Args:
    states: of all layers.
    start: first query.
    length: tokens per row; queries beyond it contribute nothing.
    top_k: see `layer_similarity`.
    block: number of queries.
  """
  positions = start + jnp.arange(block)
  weights = jnp.stack([state.weights(positions) for state in states]).astype(jnp.float32)
  batch = weights.shape[1]
  only = lambda queries, values: values * queries.astype(values.dtype)[:, None, None, :, None]
  weights = only((positions < length)[None], weights)
  windows = jnp.asarray([[_window(state) or length] for state in states])
  seen = jnp.where(
    (positions < length)[None], jnp.minimum((positions + 1)[None], windows), 0
  )  # indexed by each layer's queries
  is_long = (seen >= top_k).astype(jnp.float32)

  product = functools.partial(jnp.einsum, "LBNTS,MBNTS->LMN", precision="highest")
  products = product(weights, weights)
  sink = weights[..., :1]
  chosen = jax.lax.top_k(weights, top_k)[1]
  heaviest = jnp.put_along_axis(jnp.zeros_like(weights), chosen, jnp.float32(1), axis=-1, inplace=False)
  heaviest = only(is_long, heaviest)

  def divergence_from(one: jax.Array) -> jax.Array:
    one = jnp.broadcast_to(one, weights.shape)
    return (entr((one + weights) / 2) - (entr(one) + entr(weights)) / 2).sum(axis=(1, 3, 4))

  return _Sums(
    products=products,
    sink_products=product(sink, sink),
    divergence=jax.lax.map(divergence_from, weights),
    overlap=product(heaviest, heaviest) / top_k,
    entropy=entr(weights).sum(axis=(1, 3, 4)),
    queries=batch * (positions < length).sum(),
    long_queries=batch * (is_long @ is_long.T),
    keys=batch * seen.sum(axis=1),
    inverse_keys=batch * jnp.where(seen > 0, 1 / jnp.maximum(seen, 1), 0.0).sum(axis=1),
  )


def _window(state: State) -> int | None:
  """The maximum number of keys that a layer's queries see; None for all."""
  assert isinstance(state, QueryKey)
  return state.specs[0].window


def _finish(sums: _Sums[np.ndarray]) -> Similarity:
  squares = np.einsum("LLN->LN", sums.products)
  return Similarity(
    cosine=_cosine(sums.products),
    cosine_without_sink=_cosine(sums.products - sums.sink_products, 1e-6 * squares),
    js_divergence=sums.divergence / sums.queries,
    top_k_overlap=sums.overlap / np.maximum(sums.long_queries, 1)[..., None],
    entropy=sums.entropy / sums.queries,
    weighted_variance=(squares - sums.inverse_keys[:, None]) / sums.keys[:, None],
  )


def _cosine(products: np.ndarray, rounding: np.ndarray | float = 0.0) -> np.ndarray:
  """Cosines ``[L, L, N]`` from inner products; 0 for a head whose weights are all zero.

  Args:
    products: ``[L, L, N]``.
    rounding: ``[L, N]``, float32 rounding error of a head's squared norm after a subtraction; below it, norms are 0.
  """
  squares = np.einsum("LLN->LN", products)
  norms = np.sqrt(np.where(squares > rounding, squares, 0.0))
  both = norms[:, None] * norms[None]
  return np.divide(products, both, out=np.zeros_like(products), where=both > 0)


def drift(similarities: Sequence[Similarity]) -> np.ndarray:
  """Distance of each checkpoint's map from the last one's: mean absolute difference of cosines over pairs of layers.

  Args:
    similarities: one per checkpoint, in order of training, from models of the same shape.

  Returns:
    float64 ``[checkpoints]``; 0 for the last.

  Raises:
    UserError: if there are none, or their shapes differ.
  """
  if len({similarity.cosine.shape for similarity in similarities}) != 1:
    raise UserError("drift needs at least one checkpoint, all with the same depth and number of heads")
  maps = [similarity.mean().cosine for similarity in similarities]
  upper = np.triu_indices(len(maps[0]), 1)
  return np.array([np.abs(each - maps[-1])[upper].mean() for each in maps])
