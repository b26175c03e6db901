"""Local reconstruction: a few training steps make a group's blocks match the outputs of the dense model's blocks.

A group is an anchor and its followers. All their weights are trained, including the anchor's queries and keys, which
the whole group uses. The loss is the squared distance of each block's output from the dense block's, relative to the
latter's square, per token, so that a group can also correct errors of earlier groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sa_jax.analysis import walk
from sa_jax.analysis.walk import Block, Chunk, Stream, Targets
from sa_jax.config import ModelConfig
from sa_jax.fields import Count, Positive, check_fields
from sa_jax.nn import PlanArrays, PlannedBlock
from sa_jax.nn.state import State
from sa_jax.plan import SharingPlan
from sa_jax.programs import fetch, program
from sa_jax.trees import Params, Tree


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """Settings of local reconstruction.

  Attributes:
    epochs: passes over the calibration rows per group.
    learning_rate: peak learning rate of Adam (Kingma & Ba, arXiv 1412.6980), relative to the root mean square of each
      weight array, which differs tenfold between models; warm-up over a tenth of the steps, then cosine decay to 0.

  Raises:
    UserError: if one is not positive.
  """

  epochs: Count = 8
  learning_rate: Positive = 2.5e-3

  def __post_init__(self) -> None:
    check_fields(self, "reconstruction")

  def rate(self, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0."""
    return self.learning_rate * warmed_cosine(step, steps, warmup=0.1)


def warmed_cosine(step: int, steps: int, warmup: float) -> float:
  """A step's fraction of the peak learning rate: a linear rise over a fraction of the steps, then cosine decay to 0."""
  rise = min((step + 1) / max(warmup * steps, 1.0), 1.0)
  return rise * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


class Group(NamedTuple):
  """A group of the shared model and its targets.

  Attributes:
    blocks: its layers' parameters, all with queries and keys.
    layers: the layers' entries of the plan.
    stream: the text before the group, in the shared model.
    targets: per layer, the outputs ``[B, T, D]`` of the dense model's blocks, by chunk.
  """

  blocks: tuple[Block, ...]
  layers: tuple[PlanArrays, ...]
  stream: Stream
  targets: tuple[tuple[jax.Array, ...], ...]


RELATIVE_ADAM = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.99), optax.scale_by_param_block_rms())
"""Adam with steps relative to the weights; with absolute steps, a rate that suits one model ruins another."""


def relative(x: jax.Array, target: jax.Array) -> jax.Array:
  """Squared distance from a target relative to its square, ``[..., D]`` → mean over tokens, float32 ``[]``."""
  wide = target.astype(jnp.float32)
  energy = jnp.maximum(jnp.sum(jnp.square(wide), axis=-1), jnp.finfo(jnp.float32).tiny)
  return jnp.mean(jnp.sum(jnp.square(x.astype(jnp.float32) - wide), axis=-1) / energy)


_relative = program()(relative)


def _distance(
  config: ModelConfig,
  blocks: tuple[Block, ...],
  layers: tuple[PlanArrays, ...],
  chunk: Chunk,
  targets: tuple[jax.Array, ...],
) -> jax.Array:
  """Mean over layers and tokens of the squared relative distance."""

  def step(stream: tuple[jax.Array, State], part: tuple[Block, PlanArrays, jax.Array]) -> tuple[Any, jax.Array]:
    block, layer, target = part
    x, state = walk.call(config, block, PlannedBlock.__call__, *stream, layer)
    return (x, state), relative(x, target)

  # a scan, so that compile time does not grow with the group
  parts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *zip(blocks, layers, targets, strict=True))
  return jax.lax.scan(step, (chunk.x, chunk.state), parts)[1].mean()


@program(static_argnames="config", donate_argnames=("blocks", "moments"))
def _step(
  config: ModelConfig,
  blocks: tuple[Block, ...],
  moments: Tree,
  layers: tuple[PlanArrays, ...],
  part: tuple[Chunk, tuple[jax.Array, ...]],
  rate: jax.Array,
) -> tuple[tuple[Block, ...], Tree]:
  """One step of Adam on a chunk and its targets."""
  gradients = jax.grad(_distance, argnums=1)(config, blocks, layers, *part)
  # Optax mixes dtypes and ranks, which the caller may have disallowed.
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    updates, moments = RELATIVE_ADAM.update(gradients, moments, blocks)
    blocks = jax.tree.map(lambda old, update: (old - rate * update).astype(old.dtype), blocks, updates)
  return blocks, moments


def distances(stream: Stream, targets: Sequence[jax.Array]) -> list[jax.Array]:
  """`relative` of each chunk after a layer, weighted so that the mean over chunks is the mean over rows."""
  rows = np.array([chunk.x.shape[0] for chunk in stream])
  parts = zip(stream, targets, rows / rows.mean(), strict=True)
  return [_relative(chunk.x, target) * weight for chunk, target, weight in parts]


def walked(config: ModelConfig, group: Group, keep: walk.Keep = walk.on_device) -> tuple[Stream, float]:
  """The text after a group, and the mean of `distances` over its layers."""
  stream, found = group.stream, []
  for block, layer, targets in zip(group.blocks, group.layers, group.targets, strict=True):
    stream = tuple(keep(walk.advance(config, block, chunk, layer)) for chunk in stream)
    found += distances(stream, targets)
  return stream, float(np.mean(fetch(found)))


def reconstruct(config: ModelConfig, group: Group, how: Reconstruction, seed: int = 0) -> Group:
  """Trains a group's blocks on the calibration rows.

  Args:
    config: the model.
    group: the group and its targets.
    how: the settings.
    seed: seed of the chunk order.
  """
  chunks = list(zip(group.stream, zip(*group.targets, strict=True), strict=True))
  # Copies, because the step donates its blocks; in float32, because small steps would be rounded away in bfloat16.
  blocks = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), group.blocks)
  moments = jax.tree.map(jnp.copy, RELATIVE_ADAM.init(blocks))
  generator, steps = np.random.default_rng(seed), how.epochs * len(chunks)
  order = np.concatenate([generator.permutation(len(chunks)) for _ in range(how.epochs)])
  with jax.default_matmul_precision("default"):  # gradients need no exact products, even if the caller asks for them
    for index, number in enumerate(order):
      rate = np.float32(how.rate(index, steps))
      blocks, moments = _step(config, blocks, moments, group.layers, chunks[number], rate)
  blocks = jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), blocks, group.blocks)
  return group._replace(blocks=blocks)


class Reconstructed(NamedTuple):
  """A completed group.

  Attributes:
    blocks: its blocks, by layer; empty if training did not reduce the distance.
    stream: the text after it.
    before: its distance from the dense model before training.
    after: the distance now.
  """

  blocks: dict[str, Block]
  stream: Stream
  before: float
  after: float


class Reconstructing:
  """Reconstructs a plan's groups in order, while text is walked through the model layer by layer.

  Args:
    config: the model.
    plan: the plan whose groups are reconstructed.
    how: the settings for each group.
    keep: where chunks are stored.
    first: the first changed layer; groups from its group on are reconstructed, none if it is past the last layer.
  """

  def __init__(self, config: ModelConfig, plan: SharingPlan, how: Reconstruction, keep: walk.Keep, first: int):
    self._config, self._plan, self._how, self._keep = config, plan, how, keep
    self._first = plan.source[first] if first < plan.num_layers else first
    self._before: Stream = ()
    self._after: Stream = ()
    self._members: list[int] = []
    self._layers: list[PlanArrays] = []
    self._targets: list[tuple[jax.Array, ...]] = []
    self._distances: list[jax.Array] = []

  def add(self, layer: int, arrays: PlanArrays, before: Stream, after: Stream, targets: tuple[Targets, ...]) -> bool:
    """Adds a layer: its entry of the plan, the text before and after it, and the dense model's targets.

    Returns:
      Whether the layer completes a group.
    """
    if layer < self._first:
      return False
    if self._plan.is_anchor(layer):
      self._before, self._members, self._layers, self._targets, self._distances = before, [], [], [], []
    self._after = after
    self._members.append(layer)
    self._layers.append(arrays)
    self._targets.append(tuple(target.x for target in targets))
    self._distances += distances(after, self._targets[-1])
    return layer + 1 == self._plan.num_layers or self._plan.is_anchor(layer + 1)

  def finish(self, layers: Params) -> Reconstructed:
    """Reconstructs the completed group.

    Args:
      layers: all layers' parameters.
    """
    blocks = tuple(layers[str(layer)] for layer in self._members)
    group = Group(blocks, tuple(self._layers), self._before, tuple(self._targets))
    group = reconstruct(self._config, group, self._how, seed=self._members[0])
    stream, distance = walked(self._config, group, self._keep)
    before = float(np.mean(fetch(self._distances)))
    if not distance < before:
      return Reconstructed({}, self._after, before, before)
    return Reconstructed(dict(zip(map(str, self._members), group.blocks, strict=True)), stream, before, distance)
