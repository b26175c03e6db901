"""Where arrays live: logical axes, the rules that map them to a mesh, and shardings made from the two."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sa_jax.errors import UserError
from sa_jax.nn import Cache, Transformer
from sa_jax.trees import Tree

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: Rules = (
  ("batch", ("data", "fsdp")),
  ("length", "sequence"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("groups", None),
  ("followers", None),
)
"""Logical axis → mesh axis, for the axes of `make_mesh`. An axis that a mesh lacks splits nothing on it."""

MESH_AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(
  data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over all devices, or over some.

  Args:
    data: over how many rows are split, and parameters are not.
    fsdp: over how many rows and parameters are split.
    tensor: over how many heads, MLP and vocabulary are split.
    sequence: over how many the tokens of a row are split. For attention they are exchanged for heads, where there are
      key heads for ``tensor * sequence`` devices; otherwise keys and values are gathered. Queries and keys are sent
      once a group, values once a layer.
    devices: which; all when None.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  sizes = (data, fsdp, tensor, sequence)
  if devices is None:
    devices = jax.devices()
  if math.prod(sizes) != len(devices):
    raise UserError(
      f"a mesh of data {data} × fsdp {fsdp} × tensor {tensor}{f' × sequence {sequence}' if sequence != 1 else ''} "
      f"needs {math.prod(sizes)} devices; there are {len(devices)}"
    )
  axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
  return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=devices)


def rules_on(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Rules:
  """The rules without the mesh axes that the mesh lacks."""

  def axes(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(entry, tuple):
      return tuple(axis for axis in entry if axis in mesh.shape) or None
    return entry if entry in mesh.shape else None

  return tuple((logical, axes(entry)) for logical, entry in rules)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
  """Makes the mesh and the rules ambient for what is traced inside.

  The modules' constraints on activations act only here, and attention that XLA cannot split finds here how to split
  itself. `jax.jit` traces once for a mesh: do not call one function under two sets of rules.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules_on(mesh, rules)):
    yield


@contextlib.contextmanager
def traced_on(mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
  """`on_mesh` from inside a function that `jax.jit` is tracing, which then needs no context around its calls.

  Without a mesh, nothing changes.
  """
  if mesh is None:
    yield
  else:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules_on(mesh, rules)):
      yield


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...], rules: Rules = DEFAULT_RULES) -> NamedSharding:
  """The sharding of an array with these logical axes; of token rows, for example, ``("batch", "length")``."""
  return NamedSharding(mesh, nn.logical_to_mesh_axes(axes, rules_on(mesh, rules)) or PartitionSpec())


def cache_shardings(model: Transformer, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Cache:
  """A `NamedSharding` for every array of a model's `sa_jax.nn.Cache`: rows like the batch, heads like the keys'."""
  sharding = named_sharding(mesh, ("batch", "kv_heads", "length", "head_dim"), rules)
  return jax.tree.map(lambda _: sharding, jax.eval_shape(lambda: Cache.empty(model.config, model.plan, 1, 1)))


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Tree, shardings: Tree) -> Tree:
  """A `NamedSharding` for every array of an optimiser's state: like its parameter, or else a copy on every device.

  Args:
    optimizer: whose ``init`` makes the state.
    params: the parameters' shapes and dtypes.
    shardings: of the parameters, as from `param_shardings`.
  """
  mesh = jax.tree.leaves(shardings)[0].mesh
  everywhere = NamedSharding(mesh, jax.sharding.PartitionSpec())
  return optax.tree.map_params(
    optimizer,
    lambda _, sharding: sharding,
    jax.eval_shape(optimizer.init, params),
    shardings,
    transform_non_params=lambda _: everywhere,
  )


def param_shardings(model: Transformer, mesh: Mesh, rules: Rules = DEFAULT_RULES, *, layout: str = "runs") -> Tree:
  """A `NamedSharding` for every parameter, from the logical axes that the modules declare.

  Args:
    model: whose parameters.
    mesh: with the axes that the rules name.
    rules: logical axis → mesh axis.
    layout: ``runs`` or ``layers``.

  Returns:
    A tree like the model's parameters.

  Raises:
    UserError: if an axis of a parameter is not divisible by its mesh axis, or two of its axes map to one mesh axis.
  """
  return tree_shardings(abstract_params(model, layout=layout, boxed=True), mesh, rules)


def tree_shardings(boxed: Tree, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Tree:
  """A `NamedSharding` for every leaf of a tree of boxed shapes, as from `abstract_params`; see `param_shardings`."""
  mesh_axes = dict(reversed(rules_on(mesh, rules)))  # the first rule for an axis counts, as for activations
  errors: list[str] = []

  def sharding(path: Any, leaf: jax.ShapeDtypeStruct, logical: PartitionSpec) -> NamedSharding | None:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    # Not by Flax's own function, which leaves an axis unsharded when its mesh axis is taken.
    spec = PartitionSpec(*(mesh_axes.get(axis) for axis in logical))
    used = [axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    if len(used) != len(set(used)):
      errors.append(f"{name}: the rules map two of its axes {tuple(logical)} to one mesh axis, {spec}")
      return None
    made = NamedSharding(mesh, spec)
    try:
      made.shard_shape(leaf.shape)
    except ValueError:
      errors.append(f"{name}: shape {list(leaf.shape)} is not divisible by {spec} on {dict(mesh.shape)}")
    return made

  shardings = jax.tree_util.tree_map_with_path(sharding, nn.unbox(boxed), nn.get_partition_spec(boxed))
  if errors:
    raise UserError("the parameters do not fit the mesh:\n  " + "\n  ".join(errors))
  return shardings


def abstract_params(model: Transformer, *, layout: str = "runs", boxed: bool = False) -> Tree:
  """The parameters' shapes and dtypes, without computing anything.

  Args:
    model: whose parameters.
    layout: ``runs`` or ``layers``.
    boxed: whether leaves carry their logical axes (`flax.linen.LogicallyPartitioned`).
  """

  def init(key: jax.Array) -> Tree:
    return model.init(key, jnp.zeros((1, 1), jnp.int32), method="init_layers" if layout == "layers" else None)

  tree = jax.eval_shape(init, jax.random.key(0))["params"]
  return tree if boxed else nn.unbox(tree)
