"""Calls that XLA cannot split over a mesh: each device makes them with its own part of the arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Axes = tuple[str | None, ...]
"""An array's logical axes."""


def on_each_device(
  call: Callable[..., Any], inputs: tuple[Axes, ...], outputs: Axes | tuple[Axes, ...]
) -> Callable[..., Any]:
  """The call as each device makes it, which XLA need not know how to split: a kernel's, for example.

  Only for calls in which rows, heads and features do not see each other, so that it adds no communication. The call
  stays as it is on one device, inside a `jax.shard_map` of the caller's, and where the rules do not split it so: there
  are none, they split the tokens of a row, or query heads from their keys.

  Args:
    call: of arrays, or of trees whose arrays all have the same axes.
    inputs: the logical axes of each; None where every device needs the whole axis.
    outputs: the same of what it returns, or of all that it returns. Heads are split as their keys are.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes or not nn.get_logical_axis_rules():
    return call
  if length_axis(mesh) is not None or not heads_stay_with_their_keys():
    return call
  axes = nn.logical_to_mesh_axes
  several = bool(outputs) and isinstance(outputs[0], tuple)
  specs = tuple(axes(each) for each in outputs) if several else axes(outputs)
  return jax.shard_map(call, in_specs=tuple(axes(each) for each in inputs), out_specs=specs, check_vma=False)


def heads_stay_with_their_keys() -> bool:
  """Whether the rules split query heads as they split key heads, so that a device has those that belong together."""
  return nn.logical_to_mesh_axes(("heads",)) == nn.logical_to_mesh_axes(("kv_heads",))


def length_axis(mesh: jax.sharding.AbstractMesh) -> str | tuple[str, ...] | None:
  """The mesh axis over which the rules split the tokens of a row; None if there is none, or it is of size 1."""
  (axis,) = nn.logical_to_mesh_axes(("length",)) if nn.get_logical_axis_rules() else (None,)
  names = (axis,) if isinstance(axis, str) else axis or ()
  return axis if math.prod(mesh.shape[name] for name in names) > 1 else None
