"""Walking text through a dense model layer by layer, with any layer acting as a follower.

A `Stream` is the text's state between two layers. Each step is one compiled function for all layers, and a walk can
start from any stored stream: trying another follower does not repeat the layers before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.display import Progress
from sa_jax.errors import UserError
from sa_jax.fields import Count, checked
from sa_jax.nn import PlanArrays, PlannedBlock, PlannedTransformer, Transformer
from sa_jax.nn.planned import empty_state
from sa_jax.nn.state import State
from sa_jax.nn.transformer import check_tokens
from sa_jax.nn.typed import apply
from sa_jax.plan import SharingPlan
from sa_jax.programs import fetch, program
from sa_jax.trees import Params, Tree

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

Block = Params
"""One block's parameters, with queries and keys."""


@struct.dataclass
class Chunk:
  """Some rows of text between two layers.

  Attributes:
    x: ``[B, T, D]``.
    state: the attention state carried to the next layer.
  """

  x: jax.Array
  state: State


Stream = tuple[Chunk, ...]


class Targets(NamedTuple):
  """The dense model's outputs of one layer, for a chunk.

  Attributes:
    y: ``[B, T, D]``, the attention's output.
    x: ``[B, T, D]``, the block's output.
    state: the layer's own attention state.
  """

  y: jax.Array
  x: jax.Array
  state: State


def walking(model: Transformer, params: Params) -> ModelConfig:
  """The config to walk with, after checking that the parameters have the layer layout and every layer's W_Q and W_K.

  Raises:
    UserError: if they do not, or the model has custom blocks.
  """
  if own := model.blocks.own:
    raise UserError(f"analysis supports only the library's own blocks, not {' and '.join(own)}")
  config = model.config
  if "layers" not in params:
    raise UserError("parameters must be in the layer layout: open the model with layout='layers'")
  layers = params["layers"]
  if missing := [
    layer for layer in range(config.num_layers) if not {"q_proj", "k_proj"} <= set(layers[str(layer)]["attention"])
  ]:
    raise UserError(
      f"layers {missing} have no q_proj and k_proj, so their attention weights are unknown: "
      "start from the dense checkpoint"
    )
  return dataclasses.replace(config, attention_state="query_key")


@program(static_argnames="config")
def _begin(config: ModelConfig, params: Params, tokens: jax.Array) -> Chunk:
  x = apply(PlannedTransformer(config), params, PlannedTransformer.embedded, tokens)
  return Chunk(x, empty_state(config, *tokens.shape))


Keep = Callable[[Tree], Tree]
"""Stores a chunk's arrays until they are needed again: `on_device` or `on_host`."""


def on_device(chunk: Tree) -> Tree:
  """Leaves a chunk's arrays where they are."""
  return chunk


def on_host(chunk: Tree) -> Tree:
  """Moves a chunk's arrays to host memory; arrays that span several hosts stay on their devices."""
  is_here = lambda leaf: isinstance(leaf, jax.Array) and leaf.is_fully_addressable
  return jax.tree.map(lambda leaf: jax.device_get(leaf) if is_here(leaf) else leaf, chunk)


def chunks(tokens: np.ndarray, chunk: int) -> list[np.ndarray]:
  """Splits token rows into chunks.

  Raises:
    UserError: if ``chunk`` is not a valid number of rows.
  """
  return np.split(tokens, range(checked("chunk", chunk, Count), len(tokens), chunk))


def token_rows(tokens: ArrayLike, vocab_size: int) -> np.ndarray:
  """Token rows as int32, checked before the conversion, which would truncate fractions and large numbers.

  Raises:
    UserError: see `check_tokens`.
  """
  check_tokens(rows := np.asarray(tokens), None, vocab_size)
  return rows.astype(np.int32)


def start(config: ModelConfig, params: Params, tokens: np.ndarray, chunk: int, keep: Keep = on_device) -> Stream:
  """The stream before layer 0, from int ``[rows, T]`` tokens, in chunks of rows."""
  outside = {name: value for name, value in params.items() if name != "layers"}
  return tuple(keep(_begin(config, outside, rows)) for rows in chunks(tokens.astype(np.int32), chunk))


def call(
  config: ModelConfig,
  block: Block,
  method: Callable[Concatenate[PlannedBlock, _Arguments], _Result],
  *args: _Arguments.args,
  **kwargs: _Arguments.kwargs,
) -> _Result:
  """Calls a method of `PlannedBlock` with a block's parameters."""
  return apply(PlannedBlock(config), block, method, *args, **kwargs)


@program(static_argnames="config")
def advance(config: ModelConfig, block: Block, chunk: Chunk, layer: PlanArrays) -> Chunk:
  """Applies one layer to a chunk, as the anchor or follower that ``layer`` says it is."""
  return Chunk(*call(config, block, PlannedBlock.__call__, chunk.x, chunk.state, layer))


@program(static_argnames="config")
def with_state(config: ModelConfig, block: Block, chunk: Chunk, layer: PlanArrays) -> Chunk:
  """A chunk before a layer, with the state that the layer uses: its own or the one carried to it."""
  return Chunk(chunk.x, call(config, block, PlannedBlock.state, chunk.x, chunk.state, layer))


@program(static_argnames="config")
def dense_layer(config: ModelConfig, block: Block, chunk: Chunk, layer: PlanArrays) -> Targets:
  """Applies one layer to a chunk as an anchor, and returns its intermediate results."""
  state = call(config, block, PlannedBlock.state, chunk.x, chunk.state, layer)
  heads = call(config, block, PlannedBlock.heads, chunk.x, state, layer.head_map)
  y = call(config, block, PlannedBlock.attention_output, heads)
  middle = call(config, block, PlannedBlock.add_attention, chunk.x, y)
  return Targets(y, call(config, block, PlannedBlock.add_mlp, middle), state)


def through(config: ModelConfig, params: Params, plan: SharingPlan, stream: Stream) -> Stream:
  """Walks a stream before layer 0 through all layers of a plan, with the config's cache dtype if it has one.

  One program serves every plan: ``params`` come from `whole`.
  """
  for layer in range(config.num_layers):
    arrays = PlanArrays.of_layer(layer, config, plan.is_anchor(layer), plan.head_map_of(layer))
    stream = tuple(advance(config, params["layers"][str(layer)], chunk, arrays) for chunk in stream)
  return stream


def whole(params: Params, dense: Params) -> Params:
  """A shared model's parameters in the shapes of its dense original's, both in the layer layout.

  Followers get the dense layer's queries and keys, which are not used; narrow values are padded with zeros.
  """

  def of(block: Block, old: Block) -> Block:
    attention, like = dict(old["attention"]) | dict(block["attention"]), old["attention"]
    for part, axis in (("v_proj", -1), ("o_proj", 1)):
      leaves = attention[part] if part == "v_proj" else {"kernel": attention[part]["kernel"]}
      padded = {name: _padded(leaf, like[part][name].shape[axis], axis) for name, leaf in leaves.items()}
      attention[part] = dict(attention[part]) | padded
    return dict(block) | {"attention": attention}

  layers = {layer: of(block, dense["layers"][layer]) for layer, block in params["layers"].items()}
  return dict(params) | {"layers": layers}


def _padded(leaf: jax.Array, size: int, axis: int) -> jax.Array:
  room = [(0, 0)] * leaf.ndim
  room[axis] = (0, size - leaf.shape[axis])
  return jnp.pad(leaf, room)


_LOGITS = 2**31
"""Maximum bytes of logits in memory."""


@program(static_argnames="config")
def row_losses(config: ModelConfig, params: Params, x: jax.Array, tokens: jax.Array) -> jax.Array:
  """Mean negative log-likelihood per row, without each row's first token, ``[B]``, from the last block's output."""

  def of(x: jax.Array, tokens: jax.Array) -> jax.Array:
    logits = apply(PlannedTransformer(config), params, PlannedTransformer.read, x)
    return -ops.token_log_likelihoods(logits[:, :-1], tokens[:, 1:]).mean(axis=-1)

  count, length = tokens.shape
  at_once = max(1, _LOGITS // (4 * length * config.vocab_size))
  if count <= at_once:
    return of(x, tokens)
  return jax.lax.map(lambda row: of(row[0][None], row[1][None])[0], (x, tokens), batch_size=at_once)


def in_float32(tree: Tree) -> Tree:
  """The tree with its floating-point arrays in float32."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def losses(config: ModelConfig, params: Params, stream: Stream, tokens: np.ndarray) -> np.ndarray:
  """`row_losses` of a stream after the last layer: float64 ``[rows]``."""
  outside = {name: value for name, value in params.items() if name != "layers"}
  out, done = [], 0
  for chunk in stream:
    rows = tokens[done : done + chunk.x.shape[0]]
    out.append(row_losses(config, outside, chunk.x, rows.astype(np.int32)))
    done += len(rows)
  return np.concatenate(fetch(out)).astype(np.float64)


def dense_trace(
  config: ModelConfig, params: Params, stream: Stream, report: Progress | None = None
) -> list[tuple[Targets, ...]]:
  """The dense model's outputs of every layer, for every chunk. Holds ``L`` layers of the text's activations."""
  trace = []
  for layer in range(config.num_layers):
    arrays = PlanArrays.of_layer(layer, config, is_anchor=True)
    targets = tuple(dense_layer(config, params["layers"][str(layer)], chunk, arrays) for chunk in stream)
    stream = tuple(Chunk(target.x, target.state) for target in targets)
    trace.append(targets)
    if report is not None:
      report(layer + 1, config.num_layers)
  return trace
