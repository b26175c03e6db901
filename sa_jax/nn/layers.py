"""The layers, in the two layouts that `Transformer` supports."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sa_jax import ops
from sa_jax.config import ModelConfig
from sa_jax.nn.block import BLOCK_OUTPUTS, AnchorBlock, Blocks, FollowerBlock, MixedBlock
from sa_jax.nn.cache import Cache
from sa_jax.nn.experts import ROUTER_SCORES
from sa_jax.nn.state import STATE, Kind, State, tapped
from sa_jax.plan import HeadMap, Run, SharingPlan
from sa_jax.trees import Tree

Portion = jax.Array | float | None
"""Share of its anchor's attention weights, 0 to 1, in a follower that also has its own; None if followers have none."""


Step = Callable[..., Any]
"""A block's method, or a step of a scan over blocks."""


def _are(name: str) -> Callable[..., bool]:
  """A policy that saves the outputs of primitives whose names contain this."""
  return lambda primitive, *_, **__: name in primitive.name


_both = jax.checkpoint_policies.save_from_both_policies
_ATTENTION = _both(
  _are("dot_product_attention_fwd"),  # cuDNN's attention, which has no checkpoint names
  jax.checkpoint_policies.save_only_these_names(ops.KEPT),
)
_PRODUCTS = _both(
  _are("ragged_dot"),  # products with experts' parameters
  jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
)
_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": _ATTENTION,
  "dots": _both(_ATTENTION, _PRODUCTS),
}

_BLOCK_INPUT = "block_input"
"""The checkpoint name of a group's follower inputs."""

_UNROLL = 4
"""Followers per iteration of a group's loop under ``remat="dots"``. A nested loop stacks the residuals twice: without
it, a train step with groups of 4 takes 3 % less time and 17 % less memory (`experiments/efficiency`). With little to
store, a plain loop holds one block's activations at a time."""


def _with_heads(state: Any, head_map: HeadMap | jax.Array | None) -> Any:
  """The state, in its form, as used by a follower with this head map."""
  return state if head_map is None else state.take_heads(jnp.asarray(head_map, jnp.int32))


def _remat(config: ModelConfig, step: Step, repeats: int, *kept: str) -> Step:
  """Rematerialises a block or a group as the config's ``remat`` says, except ``kept``.

  ``repeats`` is how often the compiled loops run it.
  """
  if config.remat == "none":
    return step
  named = jax.checkpoint_policies.save_only_these_names(*kept)
  policy = _both(_REMAT_POLICIES[config.remat], named)
  # The compiler removes a loop of one iteration, and would then eliminate the recomputation as common subexpressions.
  return nn.remat(step, prevent_cse=repeats == 1, policy=policy)


class Own(NamedTuple):
  """Per-follower data besides parameters.

  Attributes:
    head_maps: int32 ``[followers, N]``; None if no follower has one.
    kinds: int32 ``[followers]``, which of the config's ``kinds`` they are, for followers that mix attention; None if
      each is its anchor's.
  """

  head_maps: jax.Array | None = None
  kinds: jax.Array | None = None


class Group(nn.Module):
  """An anchor block and its followers; the state is broadcast into a scan over the followers.

  Under remat the backward pass recomputes block by block: recomputing a whole group would hold the activations of all
  followers at the same time. It stores each block's input and the state, which `Runs` may recompute once per group.

  Attributes:
    config: the model.
    followers: how many followers the group has.
    groups: how many groups the scan around this one covers.
    blocks: the block types.
  """

  config: ModelConfig
  followers: int
  groups: int = 1
  blocks: Blocks = Blocks()

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    rows: ops.Rows = ops.Rows(),
    kind: Kind = 0,
    own: Own = Own(),
    share: Portion = None,
  ) -> jax.Array:
    """The group's layers.

    Args:
      x: ``[B, T, D]``.
      rows: which tokens each token may attend to.
      kind: which of the config's ``kinds`` the anchor is.
      own: per-follower data.
      share: see `Portion`.

    Returns:
      ``[B, T, D]``.
    """
    config = self.config
    # Not `functools.partial`: `nn.tabulate` needs a `__name__`.
    first = lambda block, x, rows: block(x, rows, kind)
    anchor = _remat(config, first, self.groups, *((STATE,) if self.followers else ()))
    x, state = anchor(self.blocks.anchor(config, name="anchor"), x, rows)
    if self.followers:
      block: type[FollowerBlock] | type[MixedBlock] = self.blocks.follower if share is None else MixedBlock
      follow: Step = lambda block, x, state, own_kind: block(x, state)
      if share is not None:
        follow = lambda block, x, state, own_kind: block(x, state, share, kind if own_kind is None else own_kind)
      unroll = min(_UNROLL, self.followers) if config.remat == "dots" else 1
      follower = _remat(config, follow, self.groups * -(-self.followers // unroll))

      # A user-defined follower may use the state for more than attention over its values.
      once = config.group_backward and own.head_maps is None and block is FollowerBlock
      together = tapped(state, self.followers, config) if once else None

      def step(block: Any, x: jax.Array, state: State, own: tuple[Own, Tree]) -> tuple[jax.Array, None]:
        (head_map, own_kind), tap = own
        used = _with_heads(state, head_map) if together is None else dataclasses.replace(together, tap=tap)
        return follower(block, checkpoint_name(x, _BLOCK_INPUT), used, own_kind), None

      scan = nn.scan(
        step,
        variable_axes={"params": 0, BLOCK_OUTPUTS: 0, ROUTER_SCORES: 0},
        split_rngs={"params": True},
        check_constancy_invariants=False,
        in_axes=(nn.broadcast, 0),
        length=self.followers,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "followers"},
      )
      taps = None if together is None else together.tap
      x, _ = scan(block(config, name="followers"), x, state, (own, taps))
    return x


class Runs(nn.Module):
  """The layers in the run layout: a loop over runs, a scan over each run's groups.

  The attention state lives inside a group and never enters the outer scan's carry.
  """

  config: ModelConfig
  plan: SharingPlan
  blocks: Blocks = Blocks()

  @nn.compact
  def __call__(self, x: jax.Array, rows: ops.Rows = ops.Rows(), share: Portion = None) -> jax.Array:
    """``[B, T, D]`` → the same shape."""
    for index, run in enumerate(self.plan.runs):
      # If groups differ in kind, kinds are scanned over: one program for any pattern and depth.
      kinds = [self.config.kind_of(layer) for layer in run.layers if self.plan.is_anchor(layer)]
      kind = jnp.asarray(kinds, jnp.int32) if len(set(kinds)) > 1 else None
      own = Own(self._head_maps(run), None if share is None else self._follower_kinds(run))
      step = _group_step(kinds[0], share)
      # Under `dots` the products that yield queries and keys are stored anyway; under `attention` a group's queries and
      # keys are small compared with its layers' outputs.
      keeps_state = self.config.remat in ("dots", "attention") and self.config.attention_state == "query_key"
      if run.followers and not keeps_state:
        step = _remat(self.config, step, run.groups, _BLOCK_INPUT)
      scan = nn.scan(
        step,
        variable_axes={"params": 0, BLOCK_OUTPUTS: 0, ROUTER_SCORES: 0},
        split_rngs={"params": True},
        check_constancy_invariants=False,
        in_axes=(nn.broadcast, 0),
        length=run.groups,
        metadata_params={nn.PARTITION_NAME: "groups"},
      )
      group = Group(self.config, run.followers, run.groups, self.blocks, name=str(index))
      x, _ = scan(group, x, rows, (kind, own))
    return x

  def _head_maps(self, run: Run) -> jax.Array | None:
    """The head maps of a run's followers, int32 ``[groups, followers, N]``; None if it has none."""
    followers = [layer for layer in run.layers if not self.plan.is_anchor(layer)]
    maps = [self.plan.head_map_of(layer) for layer in followers]
    if not any(maps):
      return None
    filled = [tuple(range(self.config.num_heads)) if entry is None else entry for entry in maps]
    return jnp.asarray(filled, jnp.int32).reshape(run.groups, run.followers, self.config.num_heads)

  def _follower_kinds(self, run: Run) -> jax.Array | None:
    """The kinds of a run's followers, int32 ``[groups, followers]``; None if each is its anchor's."""
    followers = [layer for layer in run.layers if not self.plan.is_anchor(layer)]
    kinds = [self.config.kind_of(layer) for layer in followers]
    if kinds == [self.config.kind_of(self.plan.source[layer]) for layer in followers]:
      return None
    return jnp.asarray(kinds, jnp.int32).reshape(run.groups, run.followers)


def _group_step(kind: int, share: Portion) -> Step:
  """One step of the scan over a run's groups, with the group's own kind if given, otherwise ``kind``."""

  def step(group: Group, x: jax.Array, rows: ops.Rows, own: tuple[jax.Array | None, Own]) -> tuple[jax.Array, None]:
    own_kind, of_followers = own
    return group(x, rows, kind if own_kind is None else own_kind, of_followers, share), None

  return step


class _Alike:
  """Block methods inside a function that `jax.jit` traces: identical blocks are traced once.

  Tracing 30 layers then takes a fraction of the time, and the compiler still sees every layer.
  """

  def __init__(self, is_traced: bool):
    # Outside a trace there is nothing to save. The functions live as long as the trace and use its mesh and rules.
    self._is_traced = is_traced
    self._known: dict[Hashable, Step] = {}

  def __call__(self, block: nn.Module, method: str, **static: Hashable) -> Step:
    """``block.method`` with static arguments bound."""
    if not self._is_traced or any(map(block.is_mutable_collection, ("params", BLOCK_OUTPUTS, ROUTER_SCORES))):
      return functools.partial(getattr(block, method), **static)
    key = (type(block), method, *static.items())
    if key not in self._known:
      apply: Step = block.clone(parent=None, name=None).apply
      self._known[key] = jax.jit(functools.partial(apply, method=method, **static), inline=True)
    return functools.partial(self._known[key], block.variables)


class Layers(nn.Module):
  """The layers in the layer layout, unrolled."""

  config: ModelConfig
  plan: SharingPlan
  blocks: Blocks = Blocks()

  def setup(self) -> None:
    self.stack: list[Any] = [
      (self.blocks.anchor if self.plan.is_anchor(layer) else self.blocks.follower)(self.config, name=str(layer))
      for layer in range(self.plan.num_layers)
    ]

  def __call__(self, x: jax.Array, rows: ops.Rows = ops.Rows()) -> jax.Array:
    """``[B, T, D]`` → the same shape."""
    # Traced separately, so that `nn.intercept_methods` (as in `sa_jax.analysis.look`) sees every layer.
    return self.prefill(x, rows, apart=True)[0]

  def prefill(self, x: jax.Array, rows: ops.Rows, apart: bool = False) -> tuple[jax.Array, Cache, tuple[State, ...]]:
    """`__call__` that also returns the cache of the T tokens, and the state that each layer used.

    ``apart`` traces every layer separately.
    """
    caches, states, alike = [], [], _Alike(isinstance(x, jax.core.Tracer) and not apart)
    for layer, block in enumerate(self.stack):
      if isinstance(block, AnchorBlock):
        x, state, cache = alike(block, "prefill", kind=self.config.kind_of(layer))(x, rows)
        used = state
      else:
        used = _with_heads(state, self.plan.head_map_of(layer))
        x, cache = alike(block, "prefill")(x, used)
      caches.append(cache)
      states.append(used)
    return x, Cache(tuple(caches)), tuple(states)

  def extend(self, x: jax.Array, cache: Cache, rows: ops.Rows) -> tuple[jax.Array, Cache]:
    """New tokens ``[B, T, D]`` with the cache; rows as in `AnchorAttention.extend`."""
    caches, alike = list(cache.layers), _Alike(isinstance(x, jax.core.Tracer))
    rows = dataclasses.replace(rows, pages=cache.pages)
    for anchor, followers in self.plan.groups:
      extend = alike(self.stack[anchor], "extend", kind=self.config.kind_of(anchor), followed=bool(followers))
      x, state, caches[anchor] = extend(x, caches[anchor], rows)
      for layer in followers:
        used = _with_heads(state, self.plan.head_map_of(layer))
        x, caches[layer] = alike(self.stack[layer], "extend")(x, used, caches[layer], rows)
    return x, Cache(tuple(caches), cache.pages)
