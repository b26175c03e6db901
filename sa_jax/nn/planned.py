"""The dense model with the plan as data: one compiled program evaluates any plan.

Every layer has an anchor's parameters, and arrays say which layers act as followers. This is for search and analysis;
for a fixed plan use `Transformer`, which does not compute what its followers do not need.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.nn.attention import AnchorAttention
from sa_jax.nn.block import Block, Middle
from sa_jax.nn.state import State, make_state
from sa_jax.nn.transformer import Frame, check_plan
from sa_jax.plan import HeadMap, SharingPlan
from sa_jax.trees import Tree


@struct.dataclass
class PlanArrays:
  """A plan as arrays: for all layers, for one layer (no first axis), or for many plans (an extra leading axis).

  Attributes:
    is_anchor: bool ``[L]``.
    head_map: int32 ``[L, N]``, the identity for layers without one.
    kind: int32 ``[L]``, which of the config's ``kinds`` a layer is.
  """

  is_anchor: Tree
  head_map: Tree
  kind: Tree

  @classmethod
  def of(cls, plan: SharingPlan, config: ModelConfig) -> PlanArrays:
    """Arrays of a model's plan.

    Raises:
      UserError: if the model cannot share attention under the plan.
    """
    check_plan(config, plan)
    layers = [
      cls.of_layer(layer, config, plan.is_anchor(layer), plan.head_map_of(layer)) for layer in range(plan.num_layers)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

  @classmethod
  def of_layer(cls, layer: int, config: ModelConfig, is_anchor: bool, head_map: HeadMap | None = None) -> PlanArrays:
    """Arrays of one layer."""
    heads = np.array(head_map or range(config.num_heads), np.int32)
    return cls(np.bool_(is_anchor), heads, np.int32(config.kind_of(layer)))

  @classmethod
  def stack(cls, plans: Sequence[SharingPlan], config: ModelConfig) -> PlanArrays:
    """Stacks plans of one model, for `jax.vmap` or `jax.lax.map`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[cls.of(plan, config) for plan in plans])


class PlannedAttention(AnchorAttention):
  """`AnchorAttention` that can act as a follower, selected by an array."""

  def state(self, x: jax.Array, carried: State, layer: PlanArrays) -> State:
    """The state of the layer's group: its own if it is an anchor, otherwise the carried one."""
    rows = ops.Rows()
    kind = jnp.asarray(layer.kind) if len(self.config.kinds) > 1 else 0
    q, k = self.query_key(x, rows, kind)
    own = self.new_state(q, self._cached(k), rows, kind)
    return jax.tree.map(lambda mine, theirs: jnp.where(layer.is_anchor, mine, theirs), own, carried)

  def heads(self, x: jax.Array, state: State, head_map: jax.Array) -> jax.Array:
    """The output projection's input, ``[B, T, N, R]``."""
    return state.take_heads(head_map).attend(self._cached(self.values(x)))

  def _cached(self, x: jax.Array) -> jax.Array:
    """Keys or values, rounded as in a cache of the config's format."""
    stored = self.config.cache_format
    return x if stored is None else stored.store(x).vectors(x.dtype)


class PlannedBlock(Block):
  """A block with `PlannedAttention` and an `AnchorBlock`'s parameters.

  It also exposes its parts, for callers that change one of them.
  """

  def setup(self) -> None:
    super().setup()
    self.attention = PlannedAttention(self.config)

  def __call__(self, x: jax.Array, carried: State, layer: PlanArrays) -> tuple[jax.Array, State]:
    """``[B, T, D]`` and the state carried to the layer → the block's output and the state for the next layer."""
    state = self.state(x, carried, layer)
    return self.rest(x, self.attention_output(self.heads(x, state, layer.head_map))), state

  def state(self, x: jax.Array, carried: State, layer: PlanArrays) -> State:
    """`PlannedAttention.state` for the block's input."""
    return self.attention.state(self.attention_norm(x), carried, layer)

  def heads(self, x: jax.Array, state: State, head_map: jax.Array) -> jax.Array:
    """`PlannedAttention.heads` for the block's input."""
    return self.attention.heads(self.attention_norm(x), state, head_map)

  def attention_output(self, heads: jax.Array) -> jax.Array:
    """The output projection: ``[B, T, N, R]`` → ``[B, T, D]``."""
    return self.attention.output(heads)

  def mlp_hidden(self, middle: Middle) -> jax.Array:
    """The input of the MLP's last projection, ``[B, T, F]``."""
    return self.mlp.hidden(self.mlp_norm(middle.read))

  def mlp_output(self, hidden: jax.Array) -> jax.Array:
    """The MLP's last projection: ``[B, T, F]`` → ``[B, T, D]``."""
    return self.mlp.down_proj(hidden)


class _PlannedGroup(nn.Module):
  """Gives the block its name in the dense run layout."""

  config: ModelConfig

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, State], layer: PlanArrays) -> tuple[tuple[jax.Array, State], None]:
    return PlannedBlock(self.config, name="anchor")(*carry, layer), None


class _PlannedRuns(nn.Module):
  """One scan over all layers. It carries the attention state, so that should be a `QueryKey`."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array, plan: PlanArrays) -> jax.Array:
    scan = nn.scan(
      _PlannedGroup,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      check_constancy_invariants=False,
      length=plan.head_map.shape[0],
      metadata_params={nn.PARTITION_NAME: "groups"},
    )
    (x, _), _ = scan(self.config, name="0")((x, empty_state(self.config, *x.shape[:2])), plan)
    return x


class PlannedTransformer(Frame):
  """The whole model, with a dense `Transformer`'s parameters in the run layout."""

  def setup(self) -> None:
    super().setup()
    self.runs = _PlannedRuns(self.config)

  def __call__(self, tokens: jax.Array, plan: PlanArrays) -> jax.Array:
    """Logits, float32 ``[B, T, V]``, for full rows of tokens, int32 ``[B, T]``, under a plan."""
    return self.read(self.runs(self.embed(tokens), plan))

  def embedded(self, tokens: jax.Array) -> jax.Array:
    """The first block's input: int32 ``[B, T]`` → ``[B, T, D]``."""
    return self.embed(tokens)


def empty_state(config: ModelConfig, batch: int, length: int) -> State:
  """A zero state for layer 0, which is an anchor and ignores it."""
  shape = lambda heads: jax.ShapeDtypeStruct((batch, length, heads, config.head_dim), jnp.dtype(config.dtype))
  rows = lambda sinks: ops.Rows(sinks=sinks if config.sinks else None)
  state = jax.eval_shape(
    lambda q, k, kind, sinks: make_state(config, q, k, rows(sinks), kind if len(config.kinds) > 1 else 0),
    shape(config.num_heads),
    shape(config.num_kv_heads),
    jax.ShapeDtypeStruct((), jnp.int32),
    jax.ShapeDtypeStruct((config.num_heads,), jnp.float32),
  )
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
