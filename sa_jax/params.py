"""The two parameter layouts, and the pure functions between them.

* layer layout: ``{"embed", "layers": {"0": block, "1": block, …}, "final_norm", "lm_head"}``, on disk and in decoding.
  A follower's block lacks `ANCHOR_ONLY`.
* run layout: ``{"embed", "runs": {"0": {"anchor": block, "followers": block}, …}, "final_norm", "lm_head"}``, for
  ``scan``. Anchors' leaves are stacked to ``[groups, …]`` and followers' to ``[groups, followers, …]``.

Everything here works on arrays (JAX or NumPy) and on `jax.ShapeDtypeStruct`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sa_jax.errors import UserError
from sa_jax.plan import Run, SharingPlan
from sa_jax.trees import Params, Tree

ANCHOR_ONLY = ("q_proj", "k_proj", "q_norm", "k_norm", "sinks")
"""Parameters of attention that anchors have and followers do not."""

Join = Callable[[Sequence[Tree], tuple[int, ...]], Tree]


def stack(params: Params, plan: SharingPlan, *, donate: bool = False, join: Join | None = None) -> dict[str, Tree]:
  """Layer layout → run layout.

  Args:
    params: in the layer layout, pruned to the plan.
    plan: defines the runs.
    donate: free each leaf's layers as soon as they are stacked, so that memory never holds two copies of the model;
      ``params`` cannot be used afterwards.
    join: for leaves that are not arrays: (leaves, shape) → the stacked leaf, with its first axis reshaped to ``shape``.

  Returns:
    The parameters in the run layout.

  Raises:
    UserError: if ``params`` are not in the layer layout, or not of this plan.
  """
  if "layers" not in params:
    raise UserError(f"stack takes the layer layout, which has 'layers'; these parameters have {sorted(params)}")
  _check_plan(params["layers"], plan)
  return _stack(params, plan, join or functools.partial(_join, donate=donate))


def stack_unpruned(params: Params, plan: SharingPlan) -> dict[str, Tree]:
  """The dense model's layer layout → the plan's run layout, with followers' `ANCHOR_ONLY` parameters kept.

  `sa_jax.nn.GradualTransformer` takes this layout; `prune` converts it to the plan's run layout. `unstack` is the
  inverse.

  Raises:
    UserError: if ``params`` are not the dense model's layer layout.
  """
  if "layers" not in params:
    raise UserError(f"stack_unpruned takes the layer layout, which has 'layers'; these have {sorted(params)}")
  _check_plan(params["layers"], SharingPlan.dense(plan.num_layers))
  return _stack(params, plan, functools.partial(_join, donate=False))


def _stack(params: Params, plan: SharingPlan, join: Join) -> dict[str, Tree]:
  layers = params["layers"]

  def stacked(blocks: Sequence[Tree], leading: tuple[int, ...]) -> Tree:
    return jax.tree.map(lambda *leaves: join(leaves, leading), *blocks, is_leaf=_is_leaf)

  runs: dict[str, Tree] = {}
  for index, run in enumerate(plan.runs):
    anchors, followers = _members(run)
    runs[str(index)] = {"anchor": stacked([layers[str(layer)] for layer in anchors], (run.groups,))}
    if followers:
      leading = (run.groups, run.followers)
      runs[str(index)]["followers"] = stacked([layers[str(layer)] for layer in followers], leading)
  return {name: value for name, value in params.items() if name != "layers"} | {"runs": runs}


def unstack(params: Params, plan: SharingPlan, *, donate: bool = False) -> dict[str, Tree]:
  """Run layout → layer layout: the inverse of `stack`, with the same arguments and errors."""
  if "runs" not in params:
    raise UserError(f"unstack takes the run layout, which has 'runs'; these parameters have {sorted(params)}")
  _check_runs(params["runs"], plan)
  layers = unstack_runs(params["runs"], plan, donate=donate)
  return {name: value for name, value in params.items() if name != "runs"} | {"layers": layers}


def unstack_runs(runs: Params, plan: SharingPlan, *, donate: bool = False) -> dict[str, Tree]:
  """Blocks by layer, from those of runs, which may lack parts, as adapters do; unchecked; otherwise as `unstack`."""
  layers: dict[str, Tree] = {}
  for index, run in enumerate(plan.runs):
    parts = runs.get(str(index), {})
    for (name, axes), numbers in zip((("anchor", 1), ("followers", 2)), _members(run), strict=True):
      if name in parts:
        _unstack_into(layers, parts[name], numbers, axes, donate)
  return {layer: layers[layer] for layer in sorted(layers, key=int)}


def prune(params: Params, plan: SharingPlan) -> dict[str, Tree]:
  """Drops the followers' `ANCHOR_ONLY` parameters, without copying arrays.

  Args:
    params: in the layer layout, or as returned by `stack_unpruned`.
    plan: defines the followers.

  Returns:
    The remaining parameters in the same layout.

  Raises:
    UserError: if an anchor of the plan has no ``q_proj`` or ``k_proj``, or the run layout is of another plan.
  """
  if "runs" in params:
    _check_runs(params["runs"], plan)
    runs = {
      index: {part: _without_own(block) if part == "followers" else block for part, block in run.items()}
      for index, run in params["runs"].items()
    }
    return dict(params) | {"runs": runs}
  layers = {}
  for layer in range(plan.num_layers):
    block = params["layers"][str(layer)]
    layers[str(layer)] = dict(block) if plan.is_anchor(layer) else _without_own(block)
  _check_plan(layers, plan)
  return dict(params) | {"layers": layers}


def _without_own(block: Params) -> dict[str, Tree]:
  """A block's parameters without what only anchors have."""
  attention = {name: leaf for name, leaf in block["attention"].items() if name not in ANCHOR_ONLY}
  return dict(block) | {"attention": attention}


def as_layers(params: Params, plan: SharingPlan) -> Params:
  """The parameters in the layer layout, unboxed; a copy if they are in the run layout.

  Raises:
    UserError: if the depth differs from the plan's, or parameters of its anchors are missing.
  """
  params = nn.unbox(params)
  if "layers" not in params:
    return unstack(params, plan)
  _check_anchors(params["layers"], plan)
  return params


def as_runs(params: Params, plan: SharingPlan) -> Params:
  """The parameters in the run layout, unboxed; a copy if they are in the layer layout."""
  params = nn.unbox(params)
  return params if "runs" in params else stack(params, plan)


def _check_anchors(layers: Params, plan: SharingPlan) -> None:
  if set(layers) != {str(layer) for layer in range(plan.num_layers)}:
    raise UserError(f"the parameters have {len(layers)} layers, the plan is for {plan.num_layers}")
  held = _held(layers, plan)
  if missing := [layer for layer in plan.anchors if not {"q_proj", "k_proj"} <= held[layer]]:
    raise UserError(
      f"the plan '{plan}' makes layers {missing} anchors, but the parameters have no q_proj and k_proj for them; "
      "start from the dense checkpoint, or choose a plan in which they follow"
    )


def _held(layers: Params, plan: SharingPlan) -> list[set[str]]:
  """Names of the parameters of each layer's attention."""
  return [set(layers[str(layer)]["attention"]) for layer in range(plan.num_layers)]


def _check_plan(layers: Params, plan: SharingPlan) -> None:
  _check_anchors(layers, plan)
  held = _held(layers, plan)
  if extra := [layer for layer in plan.followers if held[layer] & set(ANCHOR_ONLY)]:
    left = sorted(set().union(*(held[layer] for layer in extra)) & set(ANCHOR_ONLY), key=ANCHOR_ONLY.index)
    raise UserError(
      f"the plan '{plan}' makes layers {extra} followers, but they still have {' and '.join(left)}; prune first"
    )


def _check_runs(runs: Params, plan: SharingPlan) -> None:
  if set(runs) != {str(index) for index in range(len(plan.runs))}:
    raise UserError(f"the parameters have runs {sorted(runs)}, the plan '{plan}' has {len(plan.runs)}")
  errors = []
  for index, run in enumerate(plan.runs):
    leading: dict[str, tuple[int, ...]] = {"anchor": (run.groups,)}
    if run.followers:
      leading["followers"] = (run.groups, run.followers)
    found = {
      part: sorted({leaf.shape[: len(leading.get(part, ()))] for leaf in jax.tree.leaves(tree, is_leaf=_is_leaf)})
      for part, tree in runs[str(index)].items()
    }
    if found != {part: [shape] for part, shape in leading.items()}:
      errors.append(f"run {index} has {run.groups} groups of {run.followers} followers, the parameters have {found}")
  if errors:
    raise UserError.of(f"the parameters are stacked for another plan than '{plan}'", errors)


def _members(run: Run) -> tuple[list[int], list[int]]:
  """The anchors and the followers of a run, each in layer order."""
  size = 1 + run.followers
  return list(run.layers)[::size], [layer for layer in run.layers if (layer - run.start) % size]


def _is_leaf(node: Tree) -> bool:
  return not isinstance(node, Mapping)


def _join(leaves: Sequence[Tree], leading: tuple[int, ...], donate: bool) -> Tree:
  """Stacks arrays and gives the new first axis the shape ``leading``."""
  first = leaves[0]
  shape = (*leading, *first.shape)
  if isinstance(first, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, first.dtype)
  if isinstance(first, np.ndarray):
    return np.stack(leaves).reshape(shape)
  stacked = jnp.stack(leaves).reshape(shape)
  if donate:
    stacked.block_until_ready()
    for leaf in leaves:
      leaf.delete()
  return stacked


def _unstack_into(layers: dict[str, Tree], stacked: Any, numbers: Sequence[int], axes: int, donate: bool) -> None:
  """Splits the leading ``axes`` of every leaf into the layers with these indices."""
  leaves, structure = jax.tree.flatten(stacked)
  columns = [_split(leaf, axes, donate) for leaf in leaves]
  for position, layer in enumerate(numbers):
    layers[str(layer)] = jax.tree.unflatten(structure, [column[position] for column in columns])


def _without_leading(leaf: jax.ShapeDtypeStruct, axes: int) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding
  if isinstance(sharding, NamedSharding):
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[axes:]))
  return jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype, sharding=sharding)


def _split(leaf: Any, axes: int, donate: bool) -> list[Tree]:
  indices = list(np.ndindex(leaf.shape[:axes]))
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return [_without_leading(leaf, axes)] * len(indices)
  rows = [leaf[index] for index in indices]
  if donate and isinstance(leaf, jax.Array):
    jax.block_until_ready(rows)
    leaf.delete()
  return rows
