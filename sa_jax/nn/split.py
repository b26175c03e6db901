"""Calls that XLA cannot split over a mesh: each device makes them with its own part of the arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

Axes = tuple[str | None, ...]
"""An array's logical axes."""


def on_each_device(
  call: Callable[..., Any], inputs: tuple[Axes, ...], outputs: Axes | tuple[Axes, ...]
) -> Callable[..., Any]:
  """The call as each device makes it, which XLA need not know how to split: a kernel's, for example.

  Only for calls in which rows, heads and features do not see each other, so that it adds no communication. The call
  stays as it is on one device, inside a `jax.shard_map` of the caller's, and where the rules do not split it so: there
  are none, they split the tokens of a row, query heads from their keys, or an axis that does not divide (one row over
  two devices): then XLA splits the call as it can.

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
  several = bool(outputs) and isinstance(outputs[0], tuple)
  in_specs = tuple(_spec(each) for each in inputs)
  out_specs = tuple(_spec(each) for each in outputs) if several else _spec(outputs)

  def split(*arrays: Any) -> Any:
    if not all(
      _divides(mesh, spec, leaf.shape) for each, spec in zip(arrays, in_specs) for leaf in jax.tree.leaves(each)
    ):
      return call(*arrays)
    return jax.shard_map(call, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

  return split


def _spec(axes: Any) -> PartitionSpec:
  """How the rules split an array with these logical axes."""
  return nn.logical_to_mesh_axes(axes) or PartitionSpec()


def _divides(mesh: jax.sharding.AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> bool:
  """Whether every device has an equal part of an array that is split so."""
  names = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
  parts = [math.prod(mesh.shape[name] for name in each) for each in names]
  return all(size % count == 0 for size, count in zip(shape, parts))


def heads_stay_with_their_keys() -> bool:
  """Whether the rules split query heads as they split key heads, so that a device has those that belong together."""
  return nn.logical_to_mesh_axes(("heads",)) == nn.logical_to_mesh_axes(("kv_heads",))


def length_axis(mesh: jax.sharding.AbstractMesh) -> str | tuple[str, ...] | None:
  """The mesh axis over which the rules split the tokens of a row; None if there is none, or it is of size 1."""
  names = _mesh_axes("length")
  if math.prod(mesh.shape[name] for name in names) == 1:
    return None
  return names[0] if len(names) == 1 else names


def query_axis(mesh: jax.sharding.AbstractMesh, kv_heads: int) -> str | tuple[str, ...] | None:
  """The mesh axis over which a row's queries are split while attention is computed; None if rows are whole there.

  Where the rules split the tokens of a row, attention splits heads over those devices instead, if there are enough key
  heads: an all-to-all exchanges tokens for heads, and another exchanges them back (DeepSpeed-Ulysses, Jacobs et al.,
  arXiv 2309.14509, section 3). Then any kernel serves, causal rows are equal work, and gradients of keys and values are
  no sums over devices. Otherwise each device keeps its queries, and has all keys and values of its rows.
  """
  axis = length_axis(mesh)
  devices = math.prod(mesh.shape[name] for name in (*_mesh_axes("kv_heads"), *_mesh_axes("length")))
  return None if heads_stay_with_their_keys() and kv_heads % devices == 0 else axis


def attention_axes(mesh: jax.sharding.AbstractMesh, heads: str, kv_heads: int) -> PartitionSpec:
  """How queries, keys or values ``[B, T, heads, H]`` are split while attention is computed.

  Args:
    mesh: the ambient one.
    heads: the logical axis of their heads: ``heads`` of queries, ``kv_heads`` of keys and values.
    kv_heads: how many key heads there are.
  """
  (batch,), tokens = _spec(("batch",)), query_axis(mesh, kv_heads)
  exchanged = _mesh_axes("length") if tokens is None else ()
  return PartitionSpec(batch, tokens if heads == "heads" else None, (*_mesh_axes(heads), *exchanged) or None, None)


def split_for_attention(x: jax.Array, heads: str, kv_heads: int) -> jax.Array:
  """The array split as `attention_axes` tells. Outside a mesh and its rules, nothing changes."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or not nn.get_logical_axis_rules():
    return x
  return jax.lax.with_sharding_constraint(x, attention_axes(mesh, heads, kv_heads))


def _mesh_axes(name: str) -> tuple[str, ...]:
  """The mesh axes over which the rules split a logical axis."""
  (axis,) = _spec((name,)) if nn.get_logical_axis_rules() else (None,)
  return (axis,) if isinstance(axis, str) else tuple(axis or ())
