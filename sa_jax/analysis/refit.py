"""Refit: layer-by-layer recovery of the loss from sharing, at no run-time cost.

Calibration rows are walked through the dense and the shared model side by side. A follower's output projection is
replaced by the ridge solution that maps its head outputs ``O`` to the dense layer's attention output ``Y``,

    W = W_O + (OᵀO + λI)⁻¹ Oᵀ(Y − O W_O),    λ = ridge × the mean diagonal of OᵀO,

whose error is at most W_O's; with a post-norm, errors are measured as in `sa_jax.analysis.problems`. Then W_V, by
conjugate gradients on the same error (also linear in W_V), and W_O again. Narrower values (`sa_jax.analysis.narrow`)
apply to every layer, and every W_O is solved. From the first changed layer on, each MLP's down projection may be
refitted in the same way, to the difference from the dense layer's output: this includes the remaining attention error
and that of earlier layers. Finally, a few training steps may improve each group (`sa_jax.analysis.reconstruct`). Only
sums over tokens are kept, so text streams through in batches; on a mesh the sums are reduced over devices.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from sa_jax.analysis import narrow, problems, walk
from sa_jax.analysis.align import can_map_by_refit, map_by_refit, shared_model, with_map
from sa_jax.analysis.reconstruct import Reconstructing, Reconstruction
from sa_jax.analysis.ridge import Sums, relative_error, solve, total
from sa_jax.analysis.walk import Block, Chunk, Stream, Targets
from sa_jax.config import ModelConfig
from sa_jax.display import Progress, table
from sa_jax.distributed import same_call_on_all
from sa_jax.errors import UserError
from sa_jax.fields import Count, Natural, Positive, check_fields
from sa_jax.nn import Middle, PlanArrays, PlannedBlock, Transformer
from sa_jax.nn.state import State
from sa_jax.nn.transformer import check_plan
from sa_jax.plan import SharingPlan
from sa_jax.programs import fetch, program
from sa_jax.sharding import placed_like, traced_where_parameters_are
from sa_jax.trees import Params, Tree


@dataclasses.dataclass(frozen=True)
class Refit:
  """What is refitted and how.

  Raises:
    UserError: if a ridge is not positive or a number of steps negative.
  """

  ridge: Positive = 0.01
  """Ridge penalty that keeps W_O near the old weights, relative to the mean energy of its inputs."""
  values: Natural = 0
  """Conjugate-gradient steps on a follower's W_V between two solutions for W_O; 0 keeps W_V."""
  value_dim: Count | None = None
  """New size of a head's values; None keeps it."""
  mlp: bool = False
  """Refit MLPs too, from the first follower on: many more weights, which overfit on little text."""
  mlp_ridge: Positive = 0.3
  """Ridge penalty that keeps the MLPs' down projection near the old weights."""
  maps: bool = False
  """Choose each follower's head map by its error after refitting, starting from the plan's map. Needs a sum over all
  (anchor head, KV head) pairs of features."""
  local_epochs: Natural = 0
  """Passes over the text that train each group to match the dense model's blocks."""
  local_rate: Positive = 2.5e-3
  """Learning rate of that training, relative to the size of each array of weights."""

  def __post_init__(self) -> None:
    check_fields(self, "refit")

  @property
  def local(self) -> Reconstruction | None:
    """Settings of the training after the closed-form solutions, or None."""
    return Reconstruction(self.local_epochs, self.local_rate) if self.local_epochs else None

  def check(self, config: ModelConfig) -> None:
    """Checks that the model can be refitted with these settings.

    Raises:
      UserError: if there are too many pairs of heads to choose maps by refit error, MLPs to refit are experts, or
        values are not wider than their new size.
    """
    if self.value_dim is not None and self.value_dim >= config.value_width:
      raise UserError(f"value_dim={self.value_dim} (must be less than the model's {config.value_width})")
    if self.mlp and config.experts is not None:
      raise UserError(
        "the MLPs of a mixture of experts cannot be refitted, as each expert has its own down projection: use "
        "mlp=False; W_O is still refitted"
      )
    if self.maps and not can_map_by_refit(config):
      raise UserError(
        f"{config.num_heads} heads × {config.num_kv_heads} KV heads × {config.value_width} are too many features to "
        "choose head maps by refit error: choose them with align, and refit without maps"
      )


class Report(NamedTuple):
  """One refitted projection.

  Attributes:
    layer: its layer.
    part: ``attention`` or ``mlp``; ``group`` for all projections from this anchor to the next.
    before: squared error before, relative to the target's energy.
    after: the same after.
    condition: estimated reciprocal condition number of the last solution; 1 if nothing was solved.
  """

  layer: int
  part: str
  before: float
  after: float
  condition: float


@program(static_argnames="config")
def head_sums(config: ModelConfig, block: Block, chunk: Chunk, y: jax.Array, head_map: jax.Array) -> Sums:
  """Sums of a follower's head outputs ``[N H]`` with the dense attention's output ``[B, T, D]``."""
  heads = walk.call(config, block, PlannedBlock.heads, chunk.x, chunk.state, head_map)
  return Sums.of(*problems.of_attention(config, block, heads, y))


@program(static_argnames="config")
def _attend(config: ModelConfig, block: Block, chunk: Chunk, layer: PlanArrays) -> tuple[Middle, State]:
  """The block's input with its attention added, and the attention state after it."""
  state = walk.call(config, block, PlannedBlock.state, chunk.x, chunk.state, layer)
  heads = walk.call(config, block, PlannedBlock.heads, chunk.x, state, layer.head_map)
  y = walk.call(config, block, PlannedBlock.attention_output, heads)
  return walk.call(config, block, PlannedBlock.add_attention, chunk.x, y), state


@program(static_argnames="config")
def _mlp_sums(config: ModelConfig, block: Block, middle: Middle, target: jax.Array) -> Sums:
  """Sums of the MLP's hidden activations ``[F]`` with what the MLP must add to reach the dense block's output."""
  return Sums.of(*problems.of_mlp(config, block, middle, (target - middle.x) / config.residual_scale))


@program(static_argnames="config")
def _mlp(config: ModelConfig, block: Block, middle: Middle) -> jax.Array:
  return walk.call(config, block, PlannedBlock.add_mlp, middle)


@program(static_argnames=("shape", "dtype"))
def _as(kernel: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
  return kernel.reshape(shape).astype(dtype)


def with_kernel(block: Block, part: str, projection: str, kernel: jax.Array) -> Block:
  """The block with one projection's kernel replaced, with the old shape, dtype and sharding."""
  old = block[part][projection]["kernel"]
  new = dict(block[part][projection]) | {"kernel": placed_like(_as(kernel, old.shape, old.dtype), old)}
  return dict(block) | {part: dict(block[part]) | {projection: new}}


class Passage(NamedTuple):
  """Text at a layer.

  Attributes:
    stream: the text before the layer, in the shared model.
    targets: the dense model's outputs of the layer, by chunk.
    calibration: number of chunks to fit to; the others only pass through.
  """

  stream: Stream
  targets: tuple[Targets, ...]
  calibration: int


def recover_layer(
  config: ModelConfig,
  block: Block,
  layer: PlanArrays,
  text: Passage,
  refit: Refit,
  keep: walk.Keep = walk.on_device,
) -> tuple[Block, Stream, list[tuple[str, Tree, Tree, Tree]]]:
  """Refits one layer of the shared model and applies it to the text.

  Args:
    config: the model.
    block: the layer's parameters.
    layer: its entry of the plan.
    text: the text before the layer.
    refit: what to refit.
    keep: where chunks are stored.

  Returns:
    The parameters, the stream after the layer, and per refitted part: part, error before, error after, condition.
  """
  done = []
  stream, targets, calibration = text
  fitted = list(zip(stream, targets, strict=True))[:calibration]
  if not layer.is_anchor or refit.value_dim is not None:
    if layer.is_anchor:
      fitted = [(keep(walk.with_state(config, block, chunk, layer)), target) for chunk, target in fitted]
    block, before, after, condition = refit_attention(config, block, fitted, layer.head_map, refit)
    done.append(("attention", before, after, condition))
  middle = [keep(_attend(config, block, chunk, layer)) for chunk in stream]
  if refit.mlp:
    pairs = zip(middle[:calibration], targets, strict=False)
    sums = total(_mlp_sums(config, block, between, target.x) for (between, _), target in pairs)
    prior = block["mlp"]["down_proj"]["kernel"]
    kernel, condition = solve(sums, prior, refit.mlp_ridge)
    done.append(("mlp", relative_error(sums, prior), relative_error(sums, kernel), condition))
    block = with_kernel(block, "mlp", "down_proj", kernel)
  return block, tuple(Chunk(keep(_mlp(config, block, between)), state) for between, state in middle), done


def refit_attention(
  config: ModelConfig, block: Block, fitted: list[tuple[Chunk, Targets]], head_map: jax.Array, refit: Refit
) -> tuple[Block, jax.Array, jax.Array, jax.Array]:
  """Refits a layer's W_O, or W_O, W_V and W_O again, and narrows its values; see `recover_layer`.

  Returns:
    The block, its relative error before and after, and the condition of the last solution.
  """

  def sums_of(block: Block) -> Sums:
    return total(head_sums(config, block, chunk, target.y, head_map) for chunk, target in fitted)

  sums = sums_of(block)
  prior = block["attention"]["o_proj"]["kernel"]
  before = relative_error(sums, prior)
  kernel, condition = solve(sums, prior, refit.ridge)
  block = with_kernel(block, "attention", "o_proj", kernel)
  if refit.values:
    block = _refit_values(config, block, fitted, head_map, refit)
    sums = sums_of(block)
    kernel, condition = solve(sums, kernel, refit.ridge)
    block = with_kernel(block, "attention", "o_proj", kernel)
  if refit.value_dim is not None:
    block, sums = narrow.narrowed(block, sums, config.num_kv_heads, refit.value_dim)
    # The ridge is relative to the mean over the kept directions.
    ridge = refit.ridge * config.value_width / refit.value_dim
    kernel, condition = solve(sums, block["attention"]["o_proj"]["kernel"], ridge)
    block = with_kernel(block, "attention", "o_proj", kernel)
  return block, before, relative_error(sums, kernel), condition


@program(static_argnames=("config", "with_target"))
def _value_product(
  config: ModelConfig,
  block: Block,
  part: tuple[Chunk, jax.Array],
  head_map: jax.Array,
  kernel: jax.Array,
  with_target: bool,
) -> jax.Array:
  """``Aᵀ(target − A kernel)``, or without target ``AᵀA kernel``; A maps W_V to the attention output.

  ``part`` is a chunk before the layer and the dense attention output; see `sa_jax.analysis.problems.weight`. All in
  float32: in half precision the steps would be rounded away, and float16's sums over tokens would overflow.
  """
  config = dataclasses.replace(config, dtype="float32")
  block, (chunk, target) = walk.in_float32((block, part))

  def output(kernel: jax.Array) -> jax.Array:
    changed = with_kernel(block, "attention", "v_proj", kernel)
    heads = walk.call(config, changed, PlannedBlock.heads, chunk.x, chunk.state, head_map)
    return walk.call(config, changed, PlannedBlock.attention_output, heads)

  offset = output(jnp.zeros_like(kernel))
  out, transpose = jax.vjp(output, kernel)
  difference = target - out if with_target else out - offset
  return transpose(difference * problems.weight(config, target) ** 2)[0]


def _refit_values(
  config: ModelConfig, block: Block, fitted: list[tuple[Chunk, Targets]], head_map: jax.Array, refit: Refit
) -> Block:
  """Conjugate gradients on the follower's error as a function of W_V, starting from the current W_V."""

  def product(kernel: jax.Array, with_target: bool) -> jax.Array:
    parts = [
      _value_product(config, block, (chunk, target.y), head_map, kernel, with_target) for chunk, target in fitted
    ]
    return jax.tree.reduce(jnp.add, parts)

  kernel = block["attention"]["v_proj"]["kernel"].astype(jnp.float32)
  residual = product(kernel, True)
  direction = residual
  square = jnp.vdot(residual, residual)
  for _ in range(refit.values):
    curved = product(direction, False)
    step = square / jnp.maximum(jnp.vdot(direction, curved), jnp.finfo(jnp.float32).tiny)
    kernel = kernel + step * direction
    residual = residual - step * curved
    new = jnp.vdot(residual, residual)
    direction = residual + new / jnp.maximum(square, jnp.finfo(jnp.float32).tiny) * direction
    square = new
  return with_kernel(block, "attention", "v_proj", kernel)


class Refitted(NamedTuple):
  """What `refit` returns.

  Attributes:
    model: the shared model, with foldable head maps folded.
    params: in the layer layout, pruned: an ordinary checkpoint.
    reports: the refitted projections, in order.
    plan: with every head map, including folded ones: the plan to pass to another refit.
  """

  model: Transformer
  params: Params
  reports: list[Report]
  plan: SharingPlan

  def _repr_html_(self) -> str:
    """The plan as a picture, and the refitted projections, for notebooks."""
    rows = [(f"layer {each.layer}, {each.part}", f"{each.before:.1%}", f"{each.after:.1%}") for each in self.reports]
    return self.plan._repr_html_() + table(rows, ["error, of the target's energy", "before", "after"])


@same_call_on_all
@traced_where_parameters_are
def refit(
  model: Transformer,
  params: Params,
  plan: SharingPlan,
  tokens: ArrayLike,
  how: Refit | None = None,
  *,
  chunk: int = 4,
  on_device: bool = False,
  progress: Progress | None = None,
) -> Refitted:
  """Refits a shared model to its dense original, layer by layer; each layer sees the refitted layers before it.

  Args:
    model: the dense model.
    params: in the layer layout, queries and keys of every layer included.
    plan: which layers follow, with or without head maps.
    tokens: int ``[rows, T]``, calibration rows without padding.
    how: what is refitted.
    chunk: rows per batch.
    on_device: whether activations stay on the device between layers, a few arrays ``[rows, T, D]``. That is faster;
      host memory, the alternative, has room for any amount of text.
    progress: called with (layers done, total layers).

  Raises:
    UserError: if the parameters lack queries and keys, a token is not in the vocabulary, or the text does not
      determine the weights in float32; as `Refit.check`.
  """
  how = how or Refit()
  config = walk.walking(model, params)
  tokens = walk.token_rows(tokens, config.vocab_size)
  check_plan(config, plan)
  how.check(config)
  keep = walk.on_device if on_device else walk.on_host
  shared = dense = walk.start(config, params, tokens, chunk, keep)
  layers = dict(params["layers"])
  reports = []
  first = 0 if how.value_dim is not None else min(plan.followers, default=config.num_layers)
  group = None if how.local is None else Reconstructing(config, plan, how.local, keep, first)
  for layer in range(config.num_layers):
    block, before = layers[str(layer)], shared
    as_dense = PlanArrays.of_layer(layer, config, is_anchor=True)
    targets = tuple(keep(walk.dense_layer(config, block, part, as_dense)) for part in dense)
    dense = tuple(Chunk(target.x, target.state) for target in targets)
    is_anchor, head_map = plan.is_anchor(layer), plan.head_map_of(layer)
    if layer < first:
      arrays, shared = as_dense, dense
    else:
      if how.maps and not is_anchor:
        head_map = map_by_refit(config, block, list(zip(shared, targets, strict=True)), head_map, how.ridge)
        plan = with_map(plan, layer, head_map)
      arrays, text = PlanArrays.of_layer(layer, config, is_anchor, head_map), Passage(shared, targets, len(shared))
      layers[str(layer)], shared, done = recover_layer(config, block, arrays, text, how, keep)
      reports += [Report(layer, part, *map(float, fetch(numbers))) for part, *numbers in done]
      check_conditions(reports)
    if group is not None and group.add(layer, arrays, before, shared, targets):
      made = group.finish(layers)
      layers, shared = layers | made.blocks, made.stream
      reports.append(Report(plan.source[layer], "group", made.before, made.after, condition=1.0))
    if progress is not None:
      progress(layer + 1, config.num_layers)
  shared_config = dataclasses.replace(config, attention_state=model.config.attention_state)
  found: Params = dict(params) | {"layers": layers}
  if how.value_dim is not None:
    found, shared_config = narrow.cut(found, how.value_dim), dataclasses.replace(shared_config, value_dim=how.value_dim)
  return Refitted(*shared_model(shared_config, found, plan), reports, plan)


def check_conditions(reports: list[Report]) -> None:
  """Checks that every solution was determined.

  Raises:
    UserError: if the text does not determine some weights in float32.
  """
  eps = float(np.finfo(np.float32).eps)
  if wrong := [f"layer {report.layer} {report.part}" for report in reports if not report.condition > eps]:
    raise UserError(
      f"the calibration text does not determine the weights of {', '.join(wrong)} in float32: "
      "give more text or a larger ridge"
    )
