"""Head alignment: which anchor head each follower head uses.

Head 3 of one layer need not correspond to head 3 of another. A map is chosen by the similarity of the attention
weights, without the first key because it makes all heads look similar, and kept only if it lowers the loss.
A map that permutes whole KV groups is folded into W_V and W_O and costs nothing at run time; any other is a gather.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from sa_jax import ops
from sa_jax.analysis import problems, walk
from sa_jax.analysis.ridge import Sums, gain, total
from sa_jax.config import ModelConfig
from sa_jax.display import Progress
from sa_jax.distributed import same_call_on_all
from sa_jax.errors import UserError
from sa_jax.evaluation.perplexity import check_length
from sa_jax.nn import PlanArrays, PlannedBlock, PlannedTransformer, Transformer
from sa_jax.nn.state import QueryKey, State
from sa_jax.nn.transformer import check_plan
from sa_jax.nn.typed import apply
from sa_jax.params import prune, stack
from sa_jax.plan import HeadMap, SharingPlan
from sa_jax.programs import fetch, fetch_each, program
from sa_jax.sharding import placed_like, traced_where_parameters_are
from sa_jax.trees import Params

Kind = Literal["group", "permutation", "free"]
KINDS: tuple[Kind, ...] = ("group", "permutation", "free")
"""Permutations that keep KV groups together; any permutations; any maps."""


@program(static_argnames=("length", "block"))
def _products(mine: State, theirs: State, length: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Inner products ``[N, N]`` of two layers' heads without the first key, and their squared norms ``[N]``."""

  def one(start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    positions = start + jnp.arange(block)
    real = (positions < length).astype(jnp.float32)[None, None, :, None]
    a, b = (state.weights(positions)[..., 1:].astype(jnp.float32) * real for state in (mine, theirs))
    product = functools.partial(jnp.einsum, precision="highest")
    return product("BNTS,BMTS->NM", a, b), product("BNTS,BNTS->N", a, a), product("BNTS,BNTS->N", b, b)

  parts = jax.lax.map(one, jnp.arange(0, length, block))
  return jax.tree.map(lambda leaf: leaf.sum(axis=0), parts)


def head_similarity(follower: Sequence[State], anchor: Sequence[State], block: int = 128) -> np.ndarray:
  """Cosine similarity of attention weights, every head of one layer with every head of another, without the first key.

  Args:
    follower: the follower's states, one per chunk of text.
    anchor: the anchor's states, for the same text.
    block: queries compared per block.

  Returns:
    float64 ``[N, N]``: follower's head, anchor's head.
  """
  first = follower[0]
  assert isinstance(first, QueryKey), "texts are walked with queries and keys"
  length = first.q.shape[1]
  parts = [_products(mine, theirs, length, min(block, length)) for mine, theirs in zip(follower, anchor, strict=True)]
  products, mine, theirs = (
    sum(part.astype(np.float64) for part in column) for column in zip(*fetch(parts), strict=True)
  )
  return products / np.maximum(np.sqrt(np.outer(mine, theirs)), np.finfo(np.float64).tiny)


def best_map(similarity: np.ndarray, num_kv_heads: int, kind: Kind) -> HeadMap:
  """The map of the given kind with the highest total similarity.

  Args:
    similarity: ``[N, N]``: follower's head, anchor's head.
    num_kv_heads: ``K``.
    kind: which maps are allowed.

  Raises:
    UserError: if the kind is unknown.
  """
  if kind == "free":
    return tuple(int(head) for head in similarity.argmax(axis=1))
  if kind == "permutation":
    return _assign(similarity)
  if kind != "group":
    raise UserError(f"unknown kind of head map {kind!r}; choose from {', '.join(KINDS)}")
  size = len(similarity) // num_kv_heads
  blocks = similarity.reshape(num_kv_heads, size, num_kv_heads, size).swapaxes(1, 2)
  inner = [[_assign(block) for block in row] for row in blocks]
  totals = np.array(
    [
      [block[np.arange(size), inside].sum() for block, inside in zip(row, insides, strict=True)]
      for row, insides in zip(blocks, inner, strict=True)
    ]
  )
  outer = _assign(totals)
  return tuple(theirs * size + inside for mine, theirs in enumerate(outer) for inside in inner[mine][theirs])


def _assign(scores: np.ndarray) -> HeadMap:
  """The permutation with the highest total score."""
  from scipy.optimize import linear_sum_assignment

  return tuple(int(column) for column in linear_sum_assignment(scores, maximize=True)[1])


_MOST_FEATURES = 16_384
"""With more features than this, `map_by_refit` would need more than a gigabyte for its sums."""


@program(static_argnames="config")
def _sums_by_pair(config: ModelConfig, block: walk.Block, chunk: walk.Chunk, y: jax.Array) -> Sums:
  """Ridge sums over all pairs of KV head and anchor head: features ``[K N H]``, the dense output as target."""
  kv_heads, size = config.num_kv_heads, config.num_heads // config.num_kv_heads
  by_pair: dict[tuple[int, int], jax.Array] = {}
  # Each KV group visits the anchor's groups in turn.
  for shift in range(kv_heads):
    head_map = [(group + shift) % kv_heads * size + i for group in range(kv_heads) for i in range(size)]
    heads = walk.call(config, block, PlannedBlock.heads, chunk.x, chunk.state, jnp.asarray(head_map, jnp.int32))
    by_pair |= {(n // size, anchor_head): heads[:, :, n] for n, anchor_head in enumerate(head_map)}
  features = jnp.stack([by_pair[pair] for pair in sorted(by_pair)], axis=2)
  return Sums.of(*problems.of_attention(config, block, features, y))


@program(static_argnames=("config", "sweeps"))
def _descend(
  config: ModelConfig, sums: Sums, prior: jax.Array, starts: jax.Array, ridge: jax.Array, sweeps: int
) -> jax.Array:
  """Coordinate descent over the heads' maps, on the penalised error after refitting W_O."""
  heads, width = config.num_heads, config.value_width
  group = jnp.arange(heads) // (heads // config.num_kv_heads)
  prior = prior.astype(jnp.float32).reshape(-1, config.embed_dim)

  def objective(head_map: jax.Array) -> jax.Array:
    pairs = group * heads + head_map
    rows = (pairs[:, None] * width + jnp.arange(width)[None]).reshape(-1)
    chosen = Sums(sums.gram[rows][:, rows], sums.cross[rows], sums.energy)
    return chosen.error(prior) - gain(chosen, prior, ridge)

  def improve(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    best, head_map = carry
    tried = jnp.tile(head_map[None], (heads, 1)).at[:, step % heads].set(jnp.arange(heads, dtype=jnp.int32))
    found = jax.vmap(objective)(tried)
    index = jnp.argmin(found)
    better = found[index] < best - 1e-6 * sums.energy
    return jnp.where(better, found[index], best), jnp.where(better, tried[index], head_map)

  start_values = jax.vmap(objective)(starts)
  index = jnp.argmin(start_values)
  return jax.lax.fori_loop(0, sweeps * heads, improve, (start_values[index], starts[index]))[1]


def can_map_by_refit(config: ModelConfig) -> bool:
  """Whether the sums of `map_by_refit`, quadratic in the number of heads, are small enough."""
  return config.num_heads * config.num_kv_heads * config.value_width <= _MOST_FEATURES


def map_by_refit(
  config: ModelConfig,
  block: walk.Block,
  fitted: Sequence[tuple[walk.Chunk, walk.Targets]],
  start: HeadMap | None,
  ridge: float,
  sweeps: int = 2,
) -> HeadMap:
  """The head map of a follower with the lowest error after refitting W_O.

  Coordinate descent, one head at a time, from the better of ``start`` and the most similar heads. It needs one pass
  over the text, because the sums for any map are parts of the sums over all pairs of heads.

  Args:
    config: the model; `can_map_by_refit` must be true for it.
    block: the follower's parameters.
    fitted: the calibration text before the layer, with the anchor's state, and the dense model's targets there.
    start: a map, or None for the identity; the result's error is no higher.
    ridge: ridge penalty of the refit.
    sweeps: number of times to reconsider each head.
  """
  sums = total(_sums_by_pair(config, block, chunk, target.y) for chunk, target in fitted)
  similarity = head_similarity([target.state for _, target in fitted], [chunk.state for chunk, _ in fitted])
  starts = [
    start or tuple(range(config.num_heads)),
    *(best_map(similarity, config.num_kv_heads, kind) for kind in KINDS),
  ]
  prior = block["attention"]["o_proj"]["kernel"]
  found = _descend(config, sums, prior, np.asarray(starts, np.int32), ridge, sweeps)
  return tuple(fetch(found).tolist())


class Aligned(NamedTuple):
  """What `align` returns.

  Attributes:
    plan: the plan with head maps.
    loss: calibration loss with them, in nats.
    identity_loss: calibration loss with the given plan, in nats.
  """

  plan: SharingPlan
  loss: float
  identity_loss: float


@program(static_argnames="config")
def _loss(config: ModelConfig, params: Params, tokens: jax.Array, plan: PlanArrays) -> jax.Array:
  logits = apply(PlannedTransformer(config), params, PlannedTransformer.__call__, tokens, plan)
  return -ops.token_log_likelihoods(logits[:, :-1], tokens[:, 1:]).mean()


@same_call_on_all
@traced_where_parameters_are
def align(
  model: Transformer,
  params: Params,
  plan: SharingPlan,
  tokens: ArrayLike,
  *,
  kinds: tuple[Kind, ...] = KINDS,
  chunk: int = 4,
  progress: Progress | None = None,
) -> Aligned:
  """Chooses a head map for every follower, in layer order, by the loss given the maps chosen before it.

  The candidates are the most similar map of each kind and the plan's current map, so the loss never increases.

  Args:
    model: the dense model.
    params: in the layer layout, queries and keys of every layer included.
    plan: which layers follow; the search starts from its head maps.
    tokens: int ``[rows, T]``, calibration rows without padding.
    kinds: the kinds of map to consider; with only ``group``, `fold` removes all run-time cost.
    chunk: rows per batch.
    progress: called with (followers done, total followers).

  Raises:
    UserError: if the parameters lack queries and keys, a token is not in the vocabulary, or rows have only one token.
  """
  config = walk.walking(model, params)
  tokens = walk.token_rows(tokens, config.vocab_size)
  check_length(tokens.shape[1])
  trace = walk.dense_trace(config, params, walk.start(config, params, tokens, chunk))
  stacked = stack(params, SharingPlan.dense(config.num_layers))

  def loss(plan: SharingPlan) -> float:
    arrays = PlanArrays.of(plan, config)
    rows = walk.chunks(tokens, chunk)
    losses = fetch_each(_loss(config, stacked, each, arrays) for each in rows)
    return sum(float(found) * len(each) for found, each in zip(losses, rows, strict=True)) / len(tokens)

  states = lambda layer: tuple(target.state for target in trace[layer])
  best = identity = loss(plan)
  for index, layer in enumerate(plan.followers):
    similarity = head_similarity(states(layer), states(plan.source[layer]))
    for candidate in dict.fromkeys(best_map(similarity, config.num_kv_heads, kind) for kind in kinds):
      tried = with_map(plan, layer, candidate)
      if tried != plan and (found := loss(tried)) < best:
        best, plan = found, tried
    if progress is not None:
      progress(index + 1, len(plan.followers))
  return Aligned(plan, best, identity)


def with_map(plan: SharingPlan, layer: int, head_map: HeadMap) -> SharingPlan:
  """The plan with one follower's head map replaced."""
  maps = {other: entry for other in plan.followers if (entry := plan.head_map_of(other)) is not None}
  return plan.with_head_maps(maps | {layer: head_map})


def is_foldable(head_map: HeadMap, num_kv_heads: int) -> bool:
  """Whether a map permutes heads and keeps KV groups together, so that it can be folded into the weights."""
  size = len(head_map) // num_kv_heads
  groups = np.asarray(head_map).reshape(num_kv_heads, size) // size
  return sorted(head_map) == list(range(len(head_map))) and bool((groups == groups[:, :1]).all())


def fold(config: ModelConfig, params: Params, plan: SharingPlan) -> tuple[Params, SharingPlan]:
  """Reorders W_V and W_O of followers whose map can be folded, and removes those maps from the plan.

  Args:
    config: the model.
    params: in the layer layout.
    plan: with head maps.

  Returns:
    Parameters and a plan that compute the same function; folded maps cost nothing at run time.
  """
  layers = dict(params["layers"])
  left = {}
  for layer in plan.followers:
    head_map = plan.head_map_of(layer)
    if head_map is None:
      continue
    if not is_foldable(head_map, config.num_kv_heads):
      left[layer] = head_map
      continue
    # The head that used anchor head m moves to position m: the inverse permutation.
    heads = np.argsort(head_map)
    size = config.num_heads // config.num_kv_heads
    kv_heads = heads[::size] // size
    attention = dict(layers[str(layer)]["attention"])
    attention["v_proj"] = {
      name: placed_like(jnp.take(leaf, kv_heads, axis=leaf.ndim - 2), leaf)
      for name, leaf in attention["v_proj"].items()
    }
    kernel = attention["o_proj"]["kernel"]
    attention["o_proj"] = attention["o_proj"] | {"kernel": placed_like(jnp.take(kernel, heads, axis=0), kernel)}
    layers[str(layer)] = dict(layers[str(layer)]) | {"attention": attention}
  return dict(params) | {"layers": layers}, plan.with_head_maps(left)


def shared_model(config: ModelConfig, params: Params, plan: SharingPlan) -> tuple[Transformer, Params]:
  """The shared model made from dense parameters: foldable maps folded, followers' queries and keys dropped.

  Raises:
    UserError: if the model cannot use the plan.
  """
  check_plan(config, plan)
  params, plan = fold(config, params, plan)
  return Transformer(config, plan), prune(params, plan)
