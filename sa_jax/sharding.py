"""Where arrays live: logical axes, the rules that map them to a mesh, and shardings made from the two."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sa_jax.nn import Cache, Transformer

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: Rules = (
  ("batch", ("data", "fsdp")),
  ("length", None),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
  ("groups", None),
  ("followers", None),
)
"""Logical axis → mesh axis, for a mesh with axes ``data``, ``fsdp`` and ``tensor``."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh over all devices.

  Raises:
    ValueError: if the three sizes do not multiply to the number of devices.
  """
  if data * fsdp * tensor != jax.device_count():
    raise ValueError(
      f"a mesh of data {data} × fsdp {fsdp} × tensor {tensor} needs {data * fsdp * tensor} devices; "
      f"there are {jax.device_count()}"
    )
  auto = (jax.sharding.AxisType.Auto,) * 3
  return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=auto)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
  """Makes the mesh and the rules ambient for what is traced inside.

  The modules' constraints on activations act only here, and attention kernels that XLA cannot split (splash) find here
  how to split themselves. `jax.jit` traces once for a mesh: do not call one function under two sets of rules.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    yield


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...], rules: Rules = DEFAULT_RULES) -> NamedSharding:
  """The sharding of an array with these logical axes; of token rows, for example, ``("batch", "length")``."""
  return NamedSharding(mesh, nn.logical_to_mesh_axes(axes, rules))


def cache_shardings(model: Transformer, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Cache:
  """A `NamedSharding` for every array of a model's `sa_jax.nn.Cache`: rows like the batch, heads like the keys'."""
  sharding = named_sharding(mesh, ("batch", "kv_heads", "length", "head_dim"), rules)
  return jax.tree.map(lambda _: sharding, jax.eval_shape(lambda: Cache.empty(model.config, model.plan, 1, 1)))


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
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


def param_shardings(model: Transformer, mesh: Mesh, rules: Rules = DEFAULT_RULES, *, layout: str = "runs") -> Any:
  """A `NamedSharding` for every parameter, from the logical axes that the modules declare.

  Args:
    model: whose parameters.
    mesh: with the axes that the rules name.
    rules: logical axis → mesh axis.
    layout: ``runs`` or ``layers``.

  Returns:
    A tree like the model's parameters.

  Raises:
    ValueError: if an axis of a parameter is not divisible by its mesh axis, or two of its axes map to one mesh axis.
  """
  boxed = abstract_params(model, layout=layout, boxed=True)
  mesh_axes = dict(rules)
  errors: list[str] = []

  def sharding(path: Any, leaf: jax.ShapeDtypeStruct, logical: PartitionSpec) -> NamedSharding | None:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    # Not by Flax's own function, which leaves an axis unsharded when its mesh axis is taken.
    spec = PartitionSpec(*(None if axis is None else mesh_axes[axis] for axis in logical))
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
    raise ValueError("the parameters do not fit the mesh:\n  " + "\n  ".join(errors))
  return shardings


def abstract_params(model: Transformer, *, layout: str = "runs", boxed: bool = False) -> Any:
  """The parameters' shapes and dtypes, without computing anything.

  Args:
    model: whose parameters.
    layout: ``runs`` or ``layers``.
    boxed: whether leaves carry their logical axes (`flax.linen.LogicallyPartitioned`).
  """

  def init(key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 1), jnp.int32), method="init_layers" if layout == "layers" else None)

  tree = jax.eval_shape(init, jax.random.key(0))["params"]
  return tree if boxed else nn.unbox(tree)
