"""Measuring plans by their loss after recovery.

The dense model's activations on the text are computed once and kept. To measure a plan, the text is walked through the
shared model with refitting, starting at the first layer that differs from a plan walked before.
Refits use calibration rows and losses held-out rows; losses are averaged over texts, not tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.analysis import problems, walk
from sa_jax.analysis.align import best_map, head_similarity
from sa_jax.analysis.record import Record, key_of
from sa_jax.analysis.refit import Passage, Refit, head_sums, recover_layer
from sa_jax.analysis.ridge import solve, total
from sa_jax.analysis.texts import Text, check_dense, check_texts
from sa_jax.analysis.walk import Block, Chunk, Stream, Targets
from sa_jax.config import CacheDtype, ModelConfig
from sa_jax.display import Progress
from sa_jax.distributed import check_call, check_given, checksum, is_multiprocess
from sa_jax.nn import PlanArrays, PlannedBlock, Transformer
from sa_jax.nn.transformer import check_plan
from sa_jax.plan import HeadMap, SharingPlan
from sa_jax.programs import fetch, program
from sa_jax.sharding import where_parameters_are
from sa_jax.trees import Params

P = ParamSpec("P")
T = TypeVar("T")


class Walk(NamedTuple):
  """The result of walking the text through a plan.

  Attributes:
    plan: the plan.
    streams: the text before each layer; empty if not kept.
    losses: float64 ``[texts]``, in nats.
  """

  plan: SharingPlan
  streams: tuple[Stream, ...]
  losses: np.ndarray


def _where_its_model_is(method: Callable[Concatenate[Judge, P], T]) -> Callable[Concatenate[Judge, P], T]:
  """Decorates a judge's method that computes, so that it runs where the parameters are."""

  @functools.wraps(method)
  def call(self: Judge, *arguments: P.args, **named: P.kwargs) -> T:
    check_call(self.params, method, self, *arguments, **named)
    with where_parameters_are(self.config, self.params):
      return method(self, *arguments, **named)

  return call


class Judge:
  """Measures plans of one dense model on some texts.

  Args:
    model: the dense model.
    params: in the layer layout, queries and keys of every layer included.
    texts: calibration and held-out rows.
    how: the recovery of a plan before its loss is measured; None for no recovery. Head maps come from `head_map`;
      ``how.maps`` applies only to the final refit.
    maps: whether followers get head maps.
    chunk: rows per batch.
    record: a JSON file of measured plans, so that a repeated search does not measure them again.
    progress: called with (layers walked, total layers) while the dense model is walked.

  Raises:
    UserError: if the parameters lack queries and keys, a text is unusable, the dense model's loss is not a number, or
      the record is from a different search.
  """

  def __init__(
    self,
    model: Transformer,
    params: Params,
    texts: Sequence[Text],
    how: Refit | None,
    *,
    maps: bool = True,
    chunk: int = 4,
    record: Path | None = None,
    progress: Progress | None = None,
  ):
    if is_multiprocess(params):
      check_given("the judge", {"model": model, "texts": texts, "how": how, "maps": maps, "chunk": chunk})
    self.config = walk.walking(model, params)
    check_texts(texts, self.config.vocab_size)
    if how is not None:
      how.check(self.config)
    self.params, self.texts, self.how, self.maps, self.chunk = params, tuple(texts), how, maps, chunk
    self._maps: dict[tuple[int, int], HeadMap | None] = {}
    self._read_texts(progress)
    self._record = Record(record, self._settings())

  @_where_its_model_is
  def _read_texts(self, progress: Progress | None) -> None:
    """Computes the dense model's activations and losses on the texts."""
    begin = functools.partial(walk.start, self.config, self.params, chunk=self.chunk)
    calibration = begin(np.concatenate([text.calibration for text in self.texts]))
    self._calibration = len(calibration)
    self._judging = np.concatenate([text.judging for text in self.texts])
    self._start: Stream = calibration + begin(self._judging)
    self._trace = walk.dense_trace(self.config, self.params, self._start, progress)
    self.dense = self._losses(self._before(self.config.num_layers)[self._calibration :])
    check_dense({text.name: float(loss) for text, loss in zip(self.texts, self.dense, strict=True)})

  def _settings(self) -> dict[str, Any]:
    return {
      "how": str(self.how),
      "maps": self.maps,
      "texts": {text.name: checksum((text.calibration, text.judging)) for text in self.texts},
      "dense": [round(float(loss), 4) for loss in self.dense],
    }

  def _losses(self, judging: Stream) -> np.ndarray:
    """Mean loss per text on the held-out rows, after the last layer."""
    rows = walk.losses(self.config, self.params, judging, self._judging)
    ends = np.cumsum([len(text.judging) for text in self.texts])
    return np.array([each.mean() for each in np.split(rows, ends[:-1])])

  @_where_its_model_is
  def rounded(self, cache_dtype: CacheDtype) -> np.ndarray:
    """The dense model's losses with keys and values rounded as in this cache, float64 ``[texts]``."""
    config, dense = dataclasses.replace(self.config, cache_dtype=cache_dtype), SharingPlan.dense(self.config.num_layers)
    return self._losses(walk.through(config, self.params, dense, self._start[self._calibration :]))

  def block(self, layer: int) -> Block:
    """The dense model's block."""
    return self.params["layers"][str(layer)]

  @_where_its_model_is
  def head_map(self, anchor: int, layer: int) -> HeadMap | None:
    """For each head of a layer, the most similar anchor head in the dense model; None without maps."""
    if not self.maps:
      return None
    if (anchor, layer) not in self._maps:
      states = lambda each: [target.state for target in self._trace[each][: self._calibration]]
      similarity = head_similarity(states(layer), states(anchor))
      self._maps[anchor, layer] = best_map(similarity, self.config.num_kv_heads, "free")
    return self._maps[anchor, layer]

  def with_maps(self, plan: SharingPlan) -> SharingPlan:
    """The plan with each follower's `head_map`."""
    if not self.maps:
      return plan
    return plan.with_head_maps({layer: self.head_map(plan.source[layer], layer) for layer in plan.followers})

  @_where_its_model_is
  def walk(self, plan: SharingPlan, base: Walk | None = None, keep: bool = False, value_dim: int | None = None) -> Walk:
    """Walks the text through the shared model.

    Args:
      plan: without head maps, which come from `head_map`.
      base: the walk of another plan, with streams and full-width values; layers before the first difference are not
        repeated.
      keep: whether to keep the streams.
      value_dim: new size of a head's values; None keeps it. Needs a recovery.

    Raises:
      UserError: if the model cannot use the plan.
    """
    check_plan(self.config, plan)
    layers, how = self.config.num_layers, self.how
    first = min(plan.followers, default=layers)
    if value_dim is not None:
      assert how is not None, "narrow values are a recovery's"
      assert base is None, "the layers before the first difference are not the other plan's"
      how, first = dataclasses.replace(how, value_dim=value_dim), 0
    if base is not None and base.streams:
      begin = next((layer for layer in range(layers) if plan.source[layer] != base.plan.source[layer]), layers)
      streams = list(base.streams[: begin + 1])
    else:
      begin = first
      streams = [self._before(layer) for layer in range(begin + 1)]
    stream = streams[-1]
    for layer in range(begin, layers):
      is_anchor = plan.is_anchor(layer)
      head_map = None if is_anchor else self.head_map(plan.source[layer], layer)
      arrays = PlanArrays.of_layer(layer, self.config, is_anchor, head_map)
      if how is None:
        stream = tuple(walk.advance(self.config, self.block(layer), chunk, arrays) for chunk in stream)
      else:
        text = Passage(stream, self._trace[layer], self._calibration)
        stream = recover_layer(self.config, self.block(layer), arrays, text, how)[1]
      if keep:
        streams.append(stream)
    losses = self._losses(stream[self._calibration :])
    self._record.add(key_of(plan, value_dim), losses)
    return Walk(plan, tuple(streams) if keep else (), losses)

  def _before(self, layer: int) -> Stream:
    """The dense model's stream before this layer."""
    if layer == 0:
      return self._start
    return tuple(Chunk(target.x, target.state) for target in self._trace[layer - 1])

  def losses(self, plan: SharingPlan, base: Walk | None = None, value_dim: int | None = None) -> np.ndarray:
    """The plan's losses, float64 ``[texts]``, recorded or measured now; arguments as in `walk`."""
    known = self._record.get(key_of(plan, value_dim))
    return self.walk(plan, base, value_dim=value_dim).losses if known is None else known

  def increase(self, losses: np.ndarray) -> float:
    """The increase of losses over the dense model's, mean over texts, in nats.

    Infinite if a loss is not a number, so that such a plan is never the better one.
    """
    increase = float((losses - self.dense).mean())
    return math.inf if math.isnan(increase) else increase

  @property
  def measured(self) -> dict[SharingPlan, np.ndarray]:
    """Every measured plan with full-width values, and its losses."""
    return self._record.measured(self.config.num_layers)

  @_where_its_model_is
  def costs(self, reach: int, progress: Progress | None = None) -> np.ndarray:
    """Estimates the cost of each single follower, without one forward pass per pair.

    The refitted follower's error δ in the attention output is weighted by the gradient g of the loss there:
    ``½ mean (g·δ)²`` over tokens, the loss's second-order term with the empirical Fisher matrix, per token.

    Args:
      reach: maximum distance between a follower and its anchor, in layers.
      progress: called with (layers done, total layers).

    Returns:
      float64 ``[L, L]``: anchor, follower; infinite if the layer cannot follow that anchor, or is out of reach.
    """
    layers = self.config.num_layers
    out = np.full((layers, layers), np.inf)
    gradients = self._gradients()
    for layer in range(layers - 1, 0, -1):
      gradient = next(gradients)
      for anchor in range(max(0, layer - reach), layer):
        if self.config.may_follow(layer, anchor):
          out[anchor, layer] = self._pair_cost(anchor, layer, gradient)
      if progress is not None:
        progress(layers - layer, layers - 1)
    return out

  def _gradients(self) -> Iterator[list[jax.Array]]:
    """Gradients of the calibration loss with respect to each layer's attention output, from the last layer down."""
    outside = {name: value for name, value in self.params.items() if name != "layers"}
    tokens = np.concatenate([text.calibration for text in self.texts])
    chunks = walk.chunks(tokens, self.chunk)
    cotangents = [
      _head_gradient(self.config, outside, target.x, rows.astype(np.int32))
      for target, rows in zip(self._trace[-1], chunks, strict=False)
    ]
    for layer in range(self.config.num_layers - 1, 0, -1):
      pairs = [
        _gradient(self.config, self.block(layer), chunk, PlanArrays.of_layer(layer, self.config, True), cotangent)
        for chunk, cotangent in zip(self._before(layer), cotangents, strict=False)
      ]
      cotangents = [x for x, _ in pairs]
      yield [y for _, y in pairs]

  def _pair_cost(self, anchor: int, layer: int, gradient: list[jax.Array]) -> float:
    block = self.block(layer)
    head_map = np.asarray(self.head_map(anchor, layer) or range(self.config.num_heads), np.int32)
    parts = [
      (Chunk(before.x, mine.state), target, weight)
      for before, mine, target, weight in zip(
        self._before(layer), self._trace[anchor], self._trace[layer], gradient, strict=False
      )
    ]
    prior = block["attention"]["o_proj"]["kernel"]
    if self.how is not None:
      sums = total(head_sums(self.config, block, chunk, target.y, head_map) for chunk, target, _ in parts)
      prior = solve(sums, prior, self.how.ridge)[0]
    squares = [_weighed_error(self.config, block, part, head_map, prior) for part in parts]
    return float(sum(fetch(squares))) / sum(chunk.x.shape[0] * chunk.x.shape[1] for chunk, *_ in parts) / 2


@program(static_argnames="config")
def _head_gradient(config: ModelConfig, params: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
  """Gradient of the summed loss with respect to the last block's output."""
  return jax.grad(lambda x: walk.row_losses(config, params, x, tokens).sum() * (tokens.shape[1] - 1))(x)


@program(static_argnames="config")
def _gradient(
  config: ModelConfig, block: Block, chunk: Chunk, layer: PlanArrays, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Backpropagates a gradient through a dense block, to its input and its attention output."""

  def through(x: jax.Array, y: jax.Array) -> jax.Array:
    state = walk.call(config, block, PlannedBlock.state, x, chunk.state, layer)
    heads = walk.call(config, block, PlannedBlock.heads, x, state, layer.head_map)
    y = walk.call(config, block, PlannedBlock.attention_output, heads) + y
    return walk.call(config, block, PlannedBlock.add_mlp, walk.call(config, block, PlannedBlock.add_attention, x, y))

  return jax.vjp(through, chunk.x, jnp.zeros_like(chunk.x))[1](cotangent)


@program(static_argnames="config")
def _weighed_error(
  config: ModelConfig,
  block: Block,
  part: tuple[Chunk, Targets, jax.Array],
  head_map: jax.Array,
  kernel: jax.Array,
) -> jax.Array:
  """Sum of (g·δ)² over a chunk's tokens, from the chunk, its target and the gradient g."""
  chunk, target, gradient = part
  heads = walk.call(config, block, PlannedBlock.heads, chunk.x, chunk.state, head_map).astype(jnp.float32)
  y = problems.without_bias(block["attention"]["o_proj"], target.y)
  error = heads.reshape(*heads.shape[:2], -1) @ kernel.astype(jnp.float32).reshape(-1, config.embed_dim) - y
  return jnp.square((error * gradient.astype(jnp.float32)).sum(axis=-1)).sum()
