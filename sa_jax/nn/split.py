"""Calls that XLA cannot split over a mesh: each device makes them with its own part of the arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sa_jax import ops
from sa_jax.errors import UserError
from sa_jax.nn.axes import Axes
from sa_jax.trees import Tree


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

  def split(*arrays: Tree) -> Tree:
    if not all(
      _divides(mesh, spec, leaf.shape) for each, spec in zip(arrays, in_specs) for leaf in jax.tree.leaves(each)
    ):
      return call(*arrays)
    return jax.shard_map(call, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

  return split


def _spec(axes: Any) -> PartitionSpec:
  """How the rules split an array with these logical axes."""
  return nn.logical_to_mesh_axes(axes) or PartitionSpec()


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, rows: ops.Rows, spec: ops.AttentionSpec, backend: str
) -> jax.Array:
  """`sa_jax.ops.attend`, of each device's queries, rows and heads by itself where XLA cannot split it over the mesh.

  Rows, heads and queries do not see each other, and what each needs is where `split_for_attention` has brought it, so
  this adds no communication. Inside a `jax.shard_map` of the caller's there is nothing left to split. Rows that do not
  divide (one row over two devices) are not split: every device attends in all of them.
  """
  ambient = jax.sharding.get_abstract_mesh()
  # Outside any context, arrays know what they are spread over, also under `jax.jit`.
  mesh = jax.typeof(q).sharding.mesh if ambient.empty else ambient
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return ops.attend(q, k, v, rows, spec, backend)
  ops.check_shapes(q, k, v, rows)
  along = query_axis(mesh, k.shape[2])
  part = rows if along is None else dataclasses.replace(rows, offset=jnp.int32(0))
  platform = mesh.abstract_device.platform if ambient.empty and mesh.abstract_device else None
  name = ops.choose_backend(backend, q, k, part, spec, platform)
  chosen = ops.backends[name]
  if along is None and chosen.partitions:
    return split_for_attention(chosen.attend(q, k, v, rows, spec), "heads", k.shape[2])
  if ambient.empty or not nn.get_logical_axis_rules():
    raise UserError(
      f"the attention backend {name!r} runs on a mesh only where the rules say how it is split: "
      "use `with sa_jax.sharding.on_mesh(mesh):`"
    )
  if not heads_stay_with_their_keys():
    raise UserError(
      f"the attention backend {name!r} runs of each device's heads by itself, which then need their keys: "
      "let the rules split 'heads' and 'kv_heads' over the same axes of the mesh"
    )

  def of_a_device(q: jax.Array, k: jax.Array, v: jax.Array, rows: ops.Rows) -> jax.Array:
    if along is not None:
      rows = dataclasses.replace(rows, offset=jax.lax.axis_index(along) * q.shape[1])
    return chosen.attend(q, k, v, rows, spec)

  queries, keys = (attention_axes(mesh, heads, k.shape[2]) for heads in ("heads", "kv_heads"))
  if not _divides(mesh, PartitionSpec(queries[0]), q.shape):
    queries, keys = (PartitionSpec(None, *axes[1:]) for axes in (queries, keys))
  in_specs = (queries, keys, keys, _rows_axes(rows, queries))
  return jax.shard_map(of_a_device, in_specs=in_specs, out_specs=queries, check_vma=False)(q, k, v, rows)


def _rows_axes(rows: ops.Rows, queries: PartitionSpec) -> ops.Rows:
  """How the arrays of rows are split beside queries ``[B, T, N, H]`` that are split so: the same tree, of specs."""
  batch, tokens, heads, _ = queries
  known = {"lengths": PartitionSpec(batch), "segments": PartitionSpec(batch, None), "offset": PartitionSpec()}

  def spec(path: Any, x: jax.Array) -> PartitionSpec:
    if path[0].name in known:
      return known[path[0].name]
    # A bias or mask, [B or 1, N or 1, T, S].
    return PartitionSpec(*(axis if size > 1 else None for axis, size in zip((batch, heads), x.shape)), tokens, None)

  return jax.tree_util.tree_map_with_path(spec, rows)


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
