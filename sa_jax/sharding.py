"""Shardings from logical axes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.mesh import check_devices
from sa_jax.mesh import make_mesh as make_mesh  # re-export
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.axes import bare, fitting, mesh_axes_of
from sa_jax.plan import SharingPlan
from sa_jax.rules import DEFAULT_RULES as DEFAULT_RULES  # re-export
from sa_jax.rules import Rules as Rules  # re-export
from sa_jax.rules import check_mesh as check_mesh  # re-export
from sa_jax.rules import idle_axes, rules_on
from sa_jax.trees import Params, Tree

if TYPE_CHECKING:
  import optax

P = ParamSpec("P")
M = TypeVar("M", bound=Transformer)
Q = TypeVar("Q", bound=Params)
T = TypeVar("T")
_LOG = logging.getLogger("sa_jax")

_RULES = jax.make_user_context(())  # part of `jax.jit`'s cache key, unlike Flax's own context
_OF_ALL_ROWS = ("heads", "kv_heads", "head_dim", "mlp", "vocab")
"""Tensor-parallel axes: rows cannot be split over a mesh axis that splits one of these, unlike ``embed`` (FSDP)."""


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
  """Sets the ambient mesh and rules, for your own ``jax.jit`` around ``model.apply``.

  Sharding constraints on activations, and attention kernels that XLA cannot partition, use the ambient rules. Functions
  of this library that take parameters do not need this context: they infer mesh and rules from the parameters
  (`where_parameters_are`).

  Args:
    mesh: the mesh, also for arrays that are created inside.
    rules: logical axis → mesh axis.

  Raises:
    UserError: see `check_mesh`.
  """
  with jax.set_mesh(mesh), traced_on(mesh, rules):
    yield


@contextlib.contextmanager
def traced_on(mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
  """`on_mesh` for tracing only: inside a function that `jax.jit` traces, or around its call. None changes nothing."""
  if mesh is None:
    yield
    return
  rules = rules_on(mesh, rules)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules), _RULES(rules):
    yield


def mesh_of(tree: object) -> Mesh | None:
  """The mesh of a tree of arrays, or of shapes with shardings; None if they are on one device."""
  for leaf in jax.tree.leaves(tree):
    if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding) and sharding.mesh.size > 1:
      return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
  return None


def rules_of(config: ModelConfig, params: Params, mesh: Mesh) -> Rules:
  """Infers the rules that shard a model's parameters over a mesh from their shardings.

  Parameters do not show how activations are sharded, which changes no result. Rows are split over all mesh axes that
  split neither heads nor MLP nor vocabulary, except the axis that `DEFAULT_RULES` use for tokens. For parameters that
  were sharded by `DEFAULT_RULES`, this returns the same rules.

  Args:
    config: the model.
    params: all parameters, in either layout: arrays, or shapes with shardings.
    mesh: their mesh.

  Returns:
    Logical axis → mesh axis, for all axes of `DEFAULT_RULES`.

  Raises:
    UserError: if some parameters are on other devices.
  """
  check_devices(params, mesh)
  block = params["runs"]["0"]["anchor"] if "runs" in params else params["layers"]["0"]
  leaves = _by_path(nn.unbox(dict(params) | {"layers": {"0": block}}))
  found: dict[str, tuple[str, ...]] = {}
  for path, names in _logical_axes(config).items():
    leaf = leaves.get(path)
    spec = tuple(getattr(getattr(leaf, "sharding", None), "spec", ()))
    spec += (None,) * (len(getattr(leaf, "shape", ())) - len(spec))
    # Leaves of stacked layers have additional leading axes.
    for name, entry in zip(reversed(names), reversed(spec)):
      if name is not None and (axes := mesh_axes_of(entry)):
        found.setdefault(name, axes)
  taken = {axis for name in _OF_ALL_ROWS for axis in found.get(name, ())}
  vocab = mesh_axes_of(dict(DEFAULT_RULES)["vocab"])
  if "vocab" not in found and taken.issuperset(vocab) and config.vocab_size % math.prod(mesh.shape[a] for a in vocab):
    found["vocab"] = vocab  # a head that these axes do not divide is replicated, but logits are split
  over_tokens = [
    axis for axis in mesh_axes_of(dict(DEFAULT_RULES)["length"]) if axis in mesh.shape and axis not in taken
  ]
  rows = tuple(axis for axis in mesh.axis_names if axis not in {*taken, *over_tokens})
  found |= {"batch": rows, "length": tuple(over_tokens)}
  # Axes that this model does not have, such as experts, keep their default rule.
  seen = {name for names in _logical_axes(config).values() for name in names}
  found |= {
    name: tuple(axis for axis in mesh_axes_of(entry) if axis in mesh.shape)
    for name, entry in DEFAULT_RULES
    if name not in seen and name not in found
  }
  # In the form of `rules_on`, so that equivalent rules have the same `jax.jit` cache key.
  spelt = lambda name, axes: axes[0] if len(axes) == 1 and name != "batch" else axes or None
  return tuple((name, spelt(name, found.get(name, ()))) for name, _ in DEFAULT_RULES)


@functools.lru_cache
def _logical_axes(config: ModelConfig) -> dict[str, PartitionSpec]:
  """The logical axes of the parameters of an anchor and outside the layers, by path in the layer layout."""
  one = Transformer(dataclasses.replace(config, num_layers=1, local_layers=()), SharingPlan.dense(1))
  return _by_path(nn.get_partition_spec(abstract_params(one, layout="layers", boxed=True)))


def _by_path(tree: object) -> dict[str, Tree]:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, PartitionSpec))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@contextlib.contextmanager
def where_parameters_are(config: ModelConfig, params: Params) -> Iterator[None]:
  """`traced_on` with the mesh and rules of the parameters; does nothing if they are on one device.

  An ambient `on_mesh` of the same mesh takes precedence, as its rules may contain more than the parameters show.
  """
  mesh = mesh_of(params)
  said = bool(nn.get_logical_axis_rules())
  if mesh is None or (said and jax.sharding.get_abstract_mesh() == mesh.abstract_mesh):
    yield
    return
  with traced_on(mesh, rules_of(config, params, mesh)):
    yield


def traced_where_parameters_are(function: Callable[Concatenate[M, Q, P], T]) -> Callable[Concatenate[M, Q, P], T]:
  """Decorates a function of a model and its parameters to run in `where_parameters_are`."""

  @functools.wraps(function)
  def call(model: M, params: Q, *arguments: P.args, **named: P.kwargs) -> T:
    with where_parameters_are(model.config, params):
      return function(model, params, *arguments, **named)

  return call


def placed_like(array: Tree, other: object) -> Tree:
  """The array with the sharding of another; unchanged if that has none, as under a trace or for NumPy arrays."""
  sharding = getattr(other, "sharding", None)
  if sharding is None or isinstance(other, jax.core.Tracer):
    return array
  if isinstance(array, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
  return jax.device_put(array, sharding)


def named_sharding(
  mesh: Mesh, axes: tuple[str | None, ...], rules: Rules = DEFAULT_RULES, shape: tuple[int, ...] | None = None
) -> NamedSharding:
  """The sharding of an array with these logical axes, such as ``("batch", "length")``. Raises as `check_mesh`.

  Args:
    mesh: the mesh.
    axes: logical axis of each dimension, or None.
    rules: logical axis → mesh axis.
    shape: the array's shape, to replicate dimensions that their mesh axis does not divide; None if all are divisible.
  """
  spec = nn.logical_to_mesh_axes(axes, rules_on(mesh, rules)) or PartitionSpec()
  return NamedSharding(mesh, spec if shape is None else fitting(spec, shape, mesh.shape))


def cache_shardings(model: Transformer, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Cache:
  """A `NamedSharding` for every array of a `sa_jax.nn.Cache`, split over rows and, if divisible, over KV heads."""
  axes = ("batch", "kv_heads", "length", "head_dim")
  # Sizes of rows and slots that every mesh axis divides.
  shapes = jax.eval_shape(lambda: Cache.empty(model.config, model.plan, mesh.size, mesh.size))
  return jax.tree.map(lambda leaf: named_sharding(mesh, axes, rules, leaf.shape), shapes)


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Tree, shardings: Tree) -> Tree:
  """A `NamedSharding` for every array of an optimiser's state: that of its parameter, or replicated.

  Args:
    optimizer: the optimiser.
    params: the parameters' shapes and dtypes.
    shardings: the parameters' shardings, from `param_shardings`.
  """
  import optax  # lazily: only training needs it, and it is an eighth of sa_jax's import time

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
    model: the model.
    mesh: the mesh.
    rules: logical axis → mesh axis.
    layout: ``runs`` or ``layers``.

  Returns:
    A tree like the model's parameters. Dimensions that their mesh axis does not divide are replicated, with a warning.

  Raises:
    UserError: if two axes of a parameter map to the same mesh axis, or the rules name a mesh axis for parameters but it
      divides none of their dimensions.
  """
  _check_experts(model.config, mesh, rules)
  shardings = tree_shardings(abstract_params(model, layout=layout, boxed=True), mesh, rules)
  splitting = {axis for leaf in jax.tree.leaves(shardings) for entry in leaf.spec for axis in mesh_axes_of(entry)}
  by_axis = dict(reversed(rules_on(mesh, rules)))
  named = {
    axis: {name: size for name, size in _sizes(model.config).items() if axis in mesh_axes_of(by_axis.get(name))}
    for axis in mesh.axis_names
    if mesh.shape[axis] > 1 and axis not in splitting
  }
  if wrong := [
    f"{axis}={mesh.shape[axis]} (it divides none of {', '.join(f'{name} {size}' for name, size in found.items())})"
    for axis, found in named.items()
    if found
  ]:
    raise UserError.of("mesh", wrong)
  return shardings


def _sizes(config: ModelConfig) -> dict[str, int]:
  """The sizes of a model's logical axes."""
  return {
    "embed": config.embed_dim,
    "heads": config.num_heads,
    "kv_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "mlp": config.mlp_dim,
    "vocab": config.vocab_size,
  }


def _check_experts(config: ModelConfig, mesh: Mesh, rules: Rules) -> None:
  """Checks that the mesh divides the experts, for one error instead of one per array.

  Raises:
    UserError: if it does not.
  """
  over = mesh_axes_of(dict(reversed(rules_on(mesh, rules))).get("experts"))
  parts = math.prod(mesh.shape[axis] for axis in over)
  if config.experts is not None and config.experts.count % parts:
    raise UserError(
      f"{config.experts.count} experts do not divide over the mesh axis {' × '.join(over)} of {parts} devices"
    )


def tree_shardings(boxed: Tree, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Tree:
  """A `NamedSharding` for every leaf of a tree of boxed shapes, as from `abstract_params`; see `param_shardings`."""
  by_axis = dict(reversed(rules_on(mesh, rules)))  # the first rule for an axis applies, as for activations
  if idle := idle_axes(mesh, rules):
    _LOG.warning("no rule uses the mesh axis %s: arrays are replicated along it", ", ".join(idle))
  errors: list[str] = []
  whole: dict[str, None] = {}

  def sharding(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct, logical: PartitionSpec) -> NamedSharding | None:
    # Flax's own function silently replicates an axis whose mesh axis is already used.
    spec = PartitionSpec(*(by_axis.get(axis) for axis in logical))
    used = [axis for entry in spec for axis in mesh_axes_of(entry)]
    if len(used) != len(set(used)):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      errors.append(f"{name}: the rules map two of its axes {tuple(logical)} to one mesh axis, {spec}")
      return None
    made = fitting(spec, leaf.shape, mesh.shape)
    for axis, size, entry, kept in zip(logical, leaf.shape, spec, made):
      if entry != kept:
        split = " × ".join(f"{name}={mesh.shape[name]}" for name in mesh_axes_of(entry))
        whole[f"{axis} of {size} ({split} does not divide it)"] = None
    return NamedSharding(mesh, made)

  shardings = jax.tree_util.tree_map_with_path(sharding, bare(boxed), nn.get_partition_spec(boxed))
  if errors:
    raise UserError("the parameters do not fit the mesh:\n  " + "\n  ".join(errors))
  if whole:
    _warn_once(f"not split over the mesh: {'; '.join(whole)}")
  return shardings


@functools.cache
def _warn_once(text: str) -> None:
  """Warns once: opening a model and training it compute the same shardings."""
  _LOG.warning(text)


def abstract_params(model: Transformer, *, layout: str = "runs", boxed: bool = False) -> Tree:
  """The parameters' shapes and dtypes, by abstract evaluation.

  Args:
    model: the model.
    layout: ``runs`` or ``layers``.
    boxed: whether leaves carry their logical axes (`sa_jax.nn.axes.WithAxes`).

  Returns:
    A tree of `jax.ShapeDtypeStruct`s.
  """

  def init(key: jax.Array) -> Tree:
    return model.init(key, jnp.zeros((1, 1), jnp.int32), method=Transformer.init_layers if layout == "layers" else None)

  tree = jax.eval_shape(init, jax.random.key(0))["params"]
  return tree if boxed else bare(tree)
