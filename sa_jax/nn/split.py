"""Calls that XLA cannot partition over a mesh: each device runs them on its shard of the arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sa_jax import ops
from sa_jax.errors import UserError
from sa_jax.nn.axes import Axes, fitting, mesh_axes_of
from sa_jax.ops.kernels import traced_mesh
from sa_jax.trees import Tree


class Heads(NamedTuple):
  """Number of heads of queries, and of keys and values."""

  queries: int
  keys: int


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
  """The array sharded by the rules, except axes that do not divide, which are replicated, as for parameters.

  Rows and tokens are sharded even then, since XLA pads them, unless there is only one.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not nn.get_logical_axis_rules():
    return x
  padded = lambda name, size: name in ("batch", "length") and size > 1
  shape = tuple(0 if padded(*axis) else axis[1] for axis in zip(axes, x.shape, strict=True))
  return jax.lax.with_sharding_constraint(x, fitting(spec_of(axes), shape, mesh.shape))


def on_each_device(
  call: Callable[..., Any], inputs: tuple[Axes, ...], outputs: Axes | tuple[Axes, ...]
) -> Callable[..., Any]:
  """The call under `jax.shard_map`, for calls that XLA cannot partition, such as kernels.

  Only for calls that are independent across rows, heads and features, so that it adds no communication. The call is
  unchanged on one device, inside a caller's `jax.shard_map`, and if the rules do not allow this split: there are none,
  they split the tokens of a row, separate query heads from their keys, or split an axis that does not divide (one row
  over two devices). Then XLA partitions the call as it can.

  Args:
    call: takes arrays, or trees whose arrays all have the same axes.
    inputs: the logical axes of each argument; None where every device needs the whole axis.
    outputs: the logical axes of the result, or of each result. Query heads are split like their keys.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not (splits(mesh) and nn.get_logical_axis_rules()):
    return call
  of_heads = {"heads", "kv_heads"} <= {name for each in inputs for name in each}
  if length_axis(mesh) is not None or (of_heads and mesh_axes("heads") != mesh_axes("kv_heads")):
    return call
  several = bool(outputs) and isinstance(outputs[0], tuple)
  in_specs = tuple(spec_of(each) for each in inputs)
  out_specs = tuple(spec_of(each) for each in outputs) if several else spec_of(outputs)

  def split(*arrays: Tree) -> Tree:
    if not all(
      divides(mesh, spec, leaf.shape) for each, spec in zip(arrays, in_specs) for leaf in jax.tree.leaves(each)
    ):
      return call(*arrays)
    return jax.shard_map(call, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

  return split


def spec_of(axes: Any) -> PartitionSpec:
  """How the rules shard an array with these logical axes."""
  return nn.logical_to_mesh_axes(axes) or PartitionSpec()


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, rows: ops.Rows, spec: ops.AttentionSpec, backend: str
) -> jax.Array:
  """`sa_jax.ops.attend`, run per device on its queries, rows and heads if XLA cannot partition it over the mesh.

  Rows, heads and queries are independent, and `split_for_attention` has already moved their inputs, so this adds no
  communication. Inside a caller's `jax.shard_map` nothing is left to split. Rows and queries that do not divide (one
  row over two devices) are not split: every device computes all of them. If key heads divide over fewer devices than
  query heads, every device has all key heads and takes those of its queries.
  """
  ambient, mesh = jax.sharding.get_abstract_mesh(), traced_mesh(q)
  if not splits(mesh):
    return ops.attend(q, k, v, rows, spec, backend)
  ops.check_shapes(q, k, v, rows)
  heads = Heads(q.shape[2], k.shape[2])
  queries = fitting(attention_axes(mesh, "heads", heads), q.shape, mesh.shape)
  along = queries[1]
  part = rows if along is None else dataclasses.replace(rows, offset=jnp.int32(0))
  platform = mesh.abstract_device.platform if ambient.empty and mesh.abstract_device else None
  name = ops.choose_backend(backend, q, k, part, spec, platform)
  chosen = ops.backends[name]
  together = heads_stay_with_their_keys(mesh, heads)
  if along is None and chosen.partitions and together:
    return split_for_attention(chosen.attend(q, k, v, rows, spec), "heads", heads)
  if ambient.empty or not nn.get_logical_axis_rules():
    raise UserError(
      f"the attention backend {name!r} needs sharding rules to run on a mesh: use `with sa_jax.sharding.on_mesh(mesh):`"
    )
  over = mesh_axes("heads", heads.queries, mesh)
  if not together and mesh_axes("kv_heads", heads.keys, mesh):
    raise UserError(
      f"the attention backend {name!r} runs on each device separately, so query heads need their KV heads there: "
      "the rules must map 'heads' and 'kv_heads' to the same mesh axes, or only 'heads'"
    )

  def of_a_device(q: jax.Array, k: jax.Array, v: jax.Array, rows: ops.Rows) -> jax.Array:
    if along is not None:
      rows = dataclasses.replace(rows, offset=jax.lax.axis_index(along) * q.shape[1])
    if not together:
      first = jax.lax.axis_index(over) * q.shape[2]
      k, v = (_of_queries(x, first, q.shape[2], heads) for x in (k, v))
    return chosen.attend(q, k, v, rows, spec)

  keys = PartitionSpec(queries[0], *attention_axes(mesh, "kv_heads", heads)[1:])
  in_specs = (queries, keys, keys, _rows_axes(rows, queries))
  return jax.shard_map(of_a_device, in_specs=in_specs, out_specs=queries, check_vma=False)(q, k, v, rows)


def parts_of_group(
  q: jax.Array, k: jax.Array, rows: ops.Rows, spec: ops.AttentionSpec, backend: str
) -> ops.Parts | None:
  """The parts of a group's single backward pass for arrays with these shardings; None if each layer needs its own.

  That is the case if the backend has none, if its backward pass does not support these rows, and on a mesh that splits
  a row's queries, or separates query heads from their keys.
  """
  ambient, mesh = jax.sharding.get_abstract_mesh(), traced_mesh(q)
  parts = ops.backends[ops.choose_backend(backend, q, k, rows, spec)].parts
  if parts is None or not parts.takes(q, rows, spec):
    return None
  if not splits(mesh):
    return parts
  heads = Heads(q.shape[2], k.shape[2])
  if ambient.empty or query_axis(mesh, heads) is not None or not heads_stay_with_their_keys(mesh, heads):
    return None
  return parts if parts.partitions else _of_each_device(parts)


def _of_each_device(parts: ops.Parts) -> ops.Parts:
  """The parts run per device, for rows that hold no arrays."""
  queries, keys, statistic = ("batch", None, "heads", None), ("batch", None, "kv_heads", None), ("batch", "heads", None)
  gathered = (None, *queries), (None, *keys), statistic, statistic

  def split(part: Callable[..., Tree], inputs: tuple[Axes, ...], outputs: Tree) -> Callable[..., Tree]:
    def call(*arguments: Tree) -> Tree:
      *arrays, rows, spec = arguments
      flat, tree = jax.tree.flatten(arrays)
      computed = lambda *flat: part(*jax.tree.unflatten(tree, flat), rows, spec)
      return on_each_device(computed, inputs, outputs)(*flat)

    return call

  return parts._replace(
    forward=split(parts.forward, (queries, keys, keys), (queries, statistic)),
    d_values=split(parts.d_values, (queries, keys, statistic, queries), keys),
    d_query_key=split(parts.d_query_key, (queries, keys, *gathered), (queries, keys)),
  )


def _of_queries(x: jax.Array, first: jax.Array, count: int, heads: Heads) -> jax.Array:
  """Keys or values ``[B, S, K, H]`` of ``count`` query heads from ``first`` on: one head if it serves all of them."""
  group = heads.queries // heads.keys
  if group % count == 0:
    return jax.lax.dynamic_slice_in_dim(x, first // group, 1, axis=2)
  return jnp.take(x, (first + jnp.arange(count)) // group, axis=2)


def _rows_axes(rows: ops.Rows, queries: PartitionSpec) -> ops.Rows:
  """How the arrays in ``rows`` are split, given the split of queries ``[B, T, N, H]``: the same tree, of specs."""
  batch, tokens, heads, _ = queries
  known = {"lengths": PartitionSpec(batch), "segments": PartitionSpec(batch, None), "offset": PartitionSpec()}
  known["sinks"] = PartitionSpec(heads)

  def spec(path: Any, x: jax.Array) -> PartitionSpec:
    if path[0].name in known:
      return known[path[0].name]
    # A bias or mask, [B or 1, N or 1, T, S].
    return PartitionSpec(*(axis if size > 1 else None for axis, size in zip((batch, heads), x.shape)), tokens, None)

  return jax.tree_util.tree_map_with_path(spec, rows)


def splits(mesh: jax.sharding.AbstractMesh) -> bool:
  """Whether XLA splits arrays over the mesh: it has several devices, and this is not inside `jax.shard_map`."""
  return not (mesh.empty or mesh.size == 1 or mesh.manual_axes)


def divides(mesh: jax.sharding.AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> bool:
  """Whether this spec gives every device an equal part of the array."""
  return fitting(spec, shape, mesh.shape) == PartitionSpec(*spec[: len(shape)])


def heads_stay_with_their_keys(mesh: jax.sharding.AbstractMesh, heads: Heads) -> bool:
  """Whether query heads are split like key heads, so that each device has matching ones."""
  return mesh_axes("heads", heads.queries, mesh) == mesh_axes("kv_heads", heads.keys, mesh)


def length_axis(mesh: jax.sharding.AbstractMesh) -> str | tuple[str, ...] | None:
  """The mesh axis over which the rules split the tokens of a row; None if there is none, or it is of size 1."""
  names = mesh_axes("length")
  if math.prod(mesh.shape[name] for name in names) == 1:
    return None
  return names[0] if len(names) == 1 else names


def query_axis(mesh: jax.sharding.AbstractMesh, heads: Heads) -> str | tuple[str, ...] | None:
  """The mesh axis over which a row's queries are split during attention; None if rows are whole.

  If the rules split the tokens of a row, attention splits heads over those devices instead, provided there are enough
  key heads: an all-to-all exchanges tokens for heads, and another exchanges them back (DeepSpeed-Ulysses, Jacobs et
  al., arXiv 2309.14509, section 3). Then any kernel works, causal rows balance, and gradients of keys and values need
  no sum over devices. Otherwise each device keeps its queries and gets all keys and values of its rows.
  """
  axis = length_axis(mesh)
  over = (*mesh_axes("kv_heads", heads.keys, mesh), *mesh_axes("length"))
  enough = heads.keys % math.prod(mesh.shape[name] for name in over) == 0
  return None if enough and heads_stay_with_their_keys(mesh, heads) else axis


def attention_axes(mesh: jax.sharding.AbstractMesh, name: str, heads: Heads) -> PartitionSpec:
  """How queries, keys or values ``[B, T, heads, H]`` are split during attention.

  Args:
    mesh: the ambient mesh.
    name: the logical axis of their heads: ``heads`` of queries, ``kv_heads`` of keys and values.
    heads: the number of heads.
  """
  (batch,), tokens = spec_of(("batch",)), query_axis(mesh, heads)
  exchanged = mesh_axes("length") if tokens is None else ()
  over = mesh_axes(name, heads.queries if name == "heads" else heads.keys, mesh)
  return PartitionSpec(batch, tokens if name == "heads" else None, (*over, *exchanged) or None, None)


def split_for_attention(x: jax.Array, name: str, heads: Heads) -> jax.Array:
  """The array sharded by `attention_axes`; unchanged without a mesh and rules."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes or not nn.get_logical_axis_rules():
    return x
  return jax.lax.with_sharding_constraint(x, attention_axes(mesh, name, heads))


def mesh_axes(name: str, size: int | None = None, mesh: jax.sharding.AbstractMesh | None = None) -> tuple[str, ...]:
  """The mesh axes over which the rules split a logical axis; none if they do not divide its size."""
  spec = spec_of((name,)) if nn.get_logical_axis_rules() else PartitionSpec(None)
  if size is not None and mesh is not None:
    spec = fitting(spec, (size,), mesh.shape)
  return mesh_axes_of(spec[0])
