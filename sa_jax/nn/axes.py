"""Parameters that carry their logical axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from jax.sharding import PartitionSpec

from sa_jax.trees import Tree

Axes = tuple[str | None, ...]
"""An array's logical axes."""
LECUN = nn.initializers.lecun_normal()
"""Kernel initialiser, for axes ``(inputs, outputs)``: normal with variance 1 / inputs (LeCun et al., 1998)."""


class WithAxes(nn.LogicallyPartitioned):
  """A parameter and its logical axes."""

  def unbox(self, apply_constraint: bool = True) -> jax.Array:
    """The parameter, sharded by the rules.

    `nn.DenseGeneral` initialises its kernel flat and unboxes it before reshaping: on a mesh, the constraint that
    unboxing applies would have a different rank from the array.
    """
    return super().unbox(apply_constraint and self.value.ndim == len(self.names))

  def to_nnx_metadata(self) -> dict[str, Any]:
    """Metadata for `flax.nnx.bridge`: the variable is sharded by the ambient mesh and rules, if there are any.

    Flax's own version always sets ``out_sharding``, and nnx cannot create such a variable outside a mesh.
    """
    metadata = {"value": self.value, "logical_axes": self.names}
    if meta.global_mesh_defined() and nn.get_logical_axis_rules():
      metadata["out_sharding"] = nn.logical_to_mesh_axes(self.names)
    return metadata

  @classmethod
  def from_nnx_metadata(cls, metadata: Mapping[str, Any]) -> WithAxes:
    """The inverse of `to_nnx_metadata`."""
    return cls(metadata["value"], metadata["logical_axes"])


def with_axes(init: Callable[..., jax.Array], names: Axes) -> Callable[..., Any]:
  """An initialiser that returns parameters as `WithAxes`, which `nn.Module.param` unboxes.

  ``init(key, shape, dtype)`` is traced once per shape: Flax evaluates a parameter's initialiser abstractly at every
  use, to compare shapes. It should outlive the call, because it is cached.
  """
  return lambda *args: WithAxes(_traced_once(init)(*args), names)


def of_vector(names: Axes) -> Axes:
  """The axes of a norm's scale or a bias: ``embed`` becomes ``vector``, which is not split by default.

  A vector is so small that gathering it takes longer than reading it; and for a single row, XLA could replicate it only
  as a last resort, with a warning for each.
  """
  return tuple("vector" if name == "embed" else name for name in names)


@functools.cache
def _traced_once(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  return jax.jit(init, static_argnums=(1, 2))


def bare(boxed: Tree) -> Tree:
  """A tree with its leaves unboxed.

  Flax's ``unbox`` is not used: under a mesh and rules it applies a sharding constraint, even to shapes.
  """
  is_box = lambda x: isinstance(x, nn.Partitioned)
  return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def mesh_axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of an entry of a rule or a `PartitionSpec`."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def fitting(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
  """The spec without entries that do not divide: such an axis of the array is replicated.

  Args:
    spec: how to split the array.
    shape: its shape.
    sizes: sizes of the mesh axes.
  """
  ways = lambda entry: math.prod(sizes[name] for name in mesh_axes_of(entry))
  return PartitionSpec(*(entry if size % ways(entry) == 0 else None for entry, size in zip(spec, shape)))
