"""Where arrays live: logical axes, the rules that map them to a mesh, and shardings made from the two."""

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
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sa_jax.config import ModelConfig
from sa_jax.errors import UserError
from sa_jax.mesh import check_devices
from sa_jax.mesh import make_mesh as make_mesh  # what the rules are for
from sa_jax.nn import Cache, Transformer
from sa_jax.nn.axes import bare, fitting, mesh_axes_of
from sa_jax.plan import SharingPlan
from sa_jax.trees import Params, Tree

if TYPE_CHECKING:
  import optax

P = ParamSpec("P")
M = TypeVar("M", bound=Transformer)
Q = TypeVar("Q", bound=Params)
T = TypeVar("T")
_LOG = logging.getLogger("sa_jax")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

DEFAULT_RULES: Rules = (
  ("batch", ("slice", "data", "fsdp", "expert")),
  ("length", "sequence"),
  ("embed", "fsdp"),
  ("vector", None),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("experts", "expert"),
  ("scores", None),
  ("vocab", "tensor"),
  ("groups", None),
  ("followers", None),
)
"""Logical axis → mesh axis, for the axes of `make_mesh`. An axis that a mesh lacks splits nothing on it."""

_RULES = jax.make_user_context(())  # part of what `jax.jit` knows a trace by, which Flax's own context is not
_OF_ALL_ROWS = ("heads", "kv_heads", "head_dim", "mlp", "vocab")
"""What every device with the same part of it needs all rows of its mesh axes for, unlike ``embed``'s (FSDP)."""


def check_mesh(mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> None:
  """Checks that a mesh is one that the rules can split arrays over.

  Raises:
    UserError: if JAX would have to be told how to split each operation over one of its axes, or no rule names any.
  """
  if explicit := [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto]:
    raise UserError(
      f"the mesh's axes {', '.join(explicit)} are not jax.sharding.AxisType.Auto: make it by "
      "sa_jax.sharding.make_mesh, or by "
      f"jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
    )
  active, idle = [name for name in mesh.axis_names if mesh.shape[name] > 1], _idle(mesh, rules)
  if idle and idle == active:
    raise UserError(
      f"no rule names an axis of this mesh: it has {', '.join(idle)}, the rules name "
      f"{', '.join(sorted(_named(rules)))}; rename its axes, or pass rules="
    )


def _idle(mesh: Mesh | AbstractMesh, rules: Rules) -> list[str]:
  """The mesh axes over which nothing is split."""
  return [name for name in mesh.axis_names if mesh.shape[name] > 1 and name not in _named(rules)]


def _named(rules: Rules) -> set[str]:
  return {axis for _, entry in rules for axis in mesh_axes_of(entry)}


def rules_on(mesh: Mesh | AbstractMesh, rules: Rules = DEFAULT_RULES) -> Rules:
  """The rules without the mesh axes that the mesh lacks.

  Raises:
    UserError: see `check_mesh`.
  """
  check_mesh(mesh, rules)

  def axes(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    if isinstance(entry, tuple):
      return tuple(axis for axis in entry if axis in mesh.shape) or None
    return entry if entry in mesh.shape else None

  return tuple((logical, axes(entry)) for logical, entry in rules)


@contextlib.contextmanager
def on_mesh(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
  """Makes the mesh and the rules ambient for what is traced inside, and the mesh for arrays that are made there.

  The modules' constraints on activations act only where rules are ambient, and attention that XLA cannot split finds
  there how to split itself. Functions of this library that take parameters need no such context: they trace where the
  parameters are (`where_parameters_are`). It is for your own ``jax.jit`` around ``model.apply``.
  """
  with jax.set_mesh(mesh), traced_on(mesh, rules):
    yield


@contextlib.contextmanager
def traced_on(mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
  """`on_mesh` for tracing alone, inside a function that `jax.jit` is tracing or around calls of one.

  Without a mesh, nothing changes.
  """
  if mesh is None:
    yield
    return
  rules = rules_on(mesh, rules)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules), _RULES(rules):
    yield


def mesh_of(tree: object) -> Mesh | None:
  """The mesh that arrays, or shapes with shardings, are spread over; None where they are on one device."""
  for leaf in jax.tree.leaves(tree):
    if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding) and sharding.mesh.size > 1:
      return sharding.mesh if isinstance(sharding.mesh, Mesh) else None
  return None


def rules_of(config: ModelConfig, params: Params, mesh: Mesh) -> Rules:
  """The rules by which a model's parameters are split over a mesh, read off their shardings.

  How activations' rows are split cannot be seen there, and changes no result: over every mesh axis that splits neither
  heads nor MLP nor vocabulary, but for the one of `DEFAULT_RULES` for tokens. Of parameters that `DEFAULT_RULES` have
  split, these are the same rules.

  Args:
    config: the model.
    params: in either layout, whole: arrays, or shapes with shardings.
    mesh: theirs.

  Raises:
    UserError: if some of them are on other devices.
  """
  check_devices(params, mesh)
  block = params["runs"]["0"]["anchor"] if "runs" in params else params["layers"]["0"]
  leaves = _by_path(nn.unbox(dict(params) | {"layers": {"0": block}}))
  found: dict[str, tuple[str, ...]] = {}
  for path, names in _logical_axes(config).items():
    leaf = leaves.get(path)
    spec = tuple(getattr(getattr(leaf, "sharding", None), "spec", ()))
    spec += (None,) * (len(getattr(leaf, "shape", ())) - len(spec))
    # Of stacked layers, the last axes are a layer's.
    for name, entry in zip(reversed(names), reversed(spec)):
      if name is not None and (axes := mesh_axes_of(entry)):
        found.setdefault(name, axes)
  taken = {axis for name in _OF_ALL_ROWS for axis in found.get(name, ())}
  vocab = mesh_axes_of(dict(DEFAULT_RULES)["vocab"])
  if "vocab" not in found and taken.issuperset(vocab) and config.vocab_size % math.prod(mesh.shape[a] for a in vocab):
    found["vocab"] = vocab  # of a head that is whole because these do not divide it, logits are split all the same
  over_tokens = [
    axis for axis in mesh_axes_of(dict(DEFAULT_RULES)["length"]) if axis in mesh.shape and axis not in taken
  ]
  rows = tuple(axis for axis in mesh.axis_names if axis not in {*taken, *over_tokens})
  found |= {"batch": rows, "length": tuple(over_tokens)}
  # Of what this model has not, such as experts, nothing is seen.
  seen = {name for names in _logical_axes(config).values() for name in names}
  found |= {
    name: tuple(axis for axis in mesh_axes_of(entry) if axis in mesh.shape)
    for name, entry in DEFAULT_RULES
    if name not in seen and name not in found
  }
  # Spelt as `rules_on` spells them, so that equal rules are the same rules to `jax.jit`.
  spelt = lambda name, axes: axes[0] if len(axes) == 1 and name != "batch" else axes or None
  return tuple((name, spelt(name, found.get(name, ()))) for name, _ in DEFAULT_RULES)


@functools.lru_cache
def _logical_axes(config: ModelConfig) -> dict[str, PartitionSpec]:
  """The logical axes of the parameters around the layers and of an anchor's, by their paths in the layer layout."""
  one = Transformer(dataclasses.replace(config, num_layers=1, local_layers=()), SharingPlan.dense(1))
  return _by_path(nn.get_partition_spec(abstract_params(one, layout="layers", boxed=True)))


def _by_path(tree: object) -> dict[str, Tree]:
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, PartitionSpec))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@contextlib.contextmanager
def where_parameters_are(config: ModelConfig, params: Params) -> Iterator[None]:
  """`traced_on` the mesh that parameters are spread over, by the rules that split them; on one device, nothing changes.

  An ambient `on_mesh` of the same mesh stays: its rules may say more than the parameters show.
  """
  mesh = mesh_of(params)
  said = bool(nn.get_logical_axis_rules())
  if mesh is None or (said and jax.sharding.get_abstract_mesh() == mesh.abstract_mesh):
    yield
    return
  with traced_on(mesh, rules_of(config, params, mesh)):
    yield


def traced_where_parameters_are(function: Callable[Concatenate[M, Q, P], T]) -> Callable[Concatenate[M, Q, P], T]:
  """A function of a model and its parameters that calls all it calls `where_parameters_are`."""

  @functools.wraps(function)
  def call(model: M, params: Q, *arguments: P.args, **named: P.kwargs) -> T:
    with where_parameters_are(model.config, params):
      return function(model, params, *arguments, **named)

  return call


def placed_like(array: Tree, other: object) -> Tree:
  """The array where another one is, split as that is; as it is where that has no place: under a trace, or NumPy's."""
  sharding = getattr(other, "sharding", None)
  if sharding is None or isinstance(other, jax.core.Tracer):
    return array
  if isinstance(array, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
  return jax.device_put(array, sharding)


def named_sharding(
  mesh: Mesh, axes: tuple[str | None, ...], rules: Rules = DEFAULT_RULES, shape: tuple[int, ...] | None = None
) -> NamedSharding:
  """The sharding of an array with these logical axes; of token rows, for example, ``("batch", "length")``.

  Args:
    mesh: with the axes that the rules name.
    axes: one a dimension.
    rules: logical axis → mesh axis.
    shape: the array's, of which a dimension that does not divide is whole on every device; None if all do.
  """
  spec = nn.logical_to_mesh_axes(axes, rules_on(mesh, rules)) or PartitionSpec()
  return NamedSharding(mesh, spec if shape is None else fitting(spec, shape, mesh.shape))


def cache_shardings(model: Transformer, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Cache:
  """A `NamedSharding` for every array of a model's `sa_jax.nn.Cache`: rows like the batch, heads like the keys'.

  Where there are key heads for fewer devices than `DEFAULT_RULES` would split them over, each device has all of them.
  """
  axes = ("batch", "kv_heads", "length", "head_dim")
  # Of a cache whose rows and slots divide.
  shapes = jax.eval_shape(lambda: Cache.empty(model.config, model.plan, mesh.size, mesh.size))
  return jax.tree.map(lambda leaf: named_sharding(mesh, axes, rules, leaf.shape), shapes)


def optimizer_shardings(optimizer: optax.GradientTransformation, params: Tree, shardings: Tree) -> Tree:
  """A `NamedSharding` for every array of an optimiser's state: like its parameter, or else a copy on every device.

  Args:
    optimizer: whose ``init`` makes the state.
    params: the parameters' shapes and dtypes.
    shardings: of the parameters, as from `param_shardings`.
  """
  import optax  # an eighth of the time that importing sa_jax takes, and only training needs it

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
    A tree like the model's parameters. An axis of theirs that its mesh axis does not divide is whole on every device,
    which one line of the log says.

  Raises:
    UserError: if two axes of a parameter map to one mesh axis, or a mesh axis that rules name for axes of parameters
      divides none of them.
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
  """How large a model's logical axes are."""
  return {
    "embed": config.embed_dim,
    "heads": config.num_heads,
    "kv_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "mlp": config.mlp_dim,
    "vocab": config.vocab_size,
  }


def _check_experts(config: ModelConfig, mesh: Mesh, rules: Rules) -> None:
  """Checks that the mesh divides the experts, before every array of theirs is told not to fit.

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
  by_axis = dict(reversed(rules_on(mesh, rules)))  # the first rule for an axis counts, as for activations
  if idle := _idle(mesh, rules):
    _LOG.warning("no rule uses the mesh axis %s: arrays are replicated along it", ", ".join(idle))
  errors: list[str] = []
  whole: dict[str, None] = {}

  def sharding(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct, logical: PartitionSpec) -> NamedSharding | None:
    # Not by Flax's own function, which leaves an axis unsharded when its mesh axis is taken.
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
  """Opening a model and training it ask for the same shardings."""
  _LOG.warning(text)


def abstract_params(model: Transformer, *, layout: str = "runs", boxed: bool = False) -> Tree:
  """The parameters' shapes and dtypes, without computing anything.

  Args:
    model: whose parameters.
    layout: ``runs`` or ``layers``.
    boxed: whether leaves carry their logical axes (`sa_jax.nn.axes.WithAxes`).
  """

  def init(key: jax.Array) -> Tree:
    return model.init(key, jnp.zeros((1, 1), jnp.int32), method=Transformer.init_layers if layout == "layers" else None)

  tree = jax.eval_shape(init, jax.random.key(0))["params"]
  return tree if boxed else bare(tree)
