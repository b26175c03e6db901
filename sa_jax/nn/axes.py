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
"""How kernels begin, of axes ``(inputs, outputs)``: normal, of variance 1 / inputs (LeCun et al., 1998)."""


class WithAxes(nn.LogicallyPartitioned):
  """A parameter and its logical axes."""

  def unbox(self, apply_constraint: bool = True) -> jax.Array:
    """The parameter, where the rules split it.

    `nn.DenseGeneral` makes its kernel flat and unboxes it before giving it its shape: on a mesh, the constraint that
    unboxing applies would be of another rank than the array.
    """
    return super().unbox(apply_constraint and self.value.ndim == len(self.names))

  def to_nnx_metadata(self) -> dict[str, Any]:
    """What `flax.nnx.bridge` makes of it: a variable that lies where the ambient mesh and rules say, if there are any.

    Flax's own form names an ``out_sharding`` always, and nnx refuses to make such a variable outside a mesh.
    """
    metadata = {"value": self.value, "logical_axes": self.names}
    if meta.global_mesh_defined() and nn.get_logical_axis_rules():
      metadata["out_sharding"] = nn.logical_to_mesh_axes(self.names)
    return metadata

  @classmethod
  def from_nnx_metadata(cls, metadata: Mapping[str, Any]) -> WithAxes:
    """The inverse."""
    return cls(metadata["value"], metadata["logical_axes"])


def with_axes(init: Callable[..., jax.Array], names: Axes) -> Callable[..., Any]:
  """An initialiser of parameters `WithAxes`, which `nn.Module.param` unboxes.

  ``init``, of a key, a shape and a dtype, is traced once for each shape: wherever a parameter is used, Flax evaluates
  its initialiser abstractly, to compare the shapes. It should outlive the call, for it is remembered.
  """
  return lambda *args: WithAxes(_traced_once(init)(*args), names)


def of_vector(names: Axes) -> Axes:
  """The axes of a norm's scale or a bias, where ``embed`` is called ``vector``, because it is not split by default.

  A vector is so small that to gather it takes longer than to read it; and for a single row, XLA could make it whole as
  a last resort only, with a warning for each.
  """
  return tuple("vector" if name == "embed" else name for name in names)


@functools.cache
def _traced_once(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  return jax.jit(init, static_argnums=(1, 2))


def bare(boxed: Tree) -> Tree:
  """A tree without the boxes around its leaves.

  Not by Flax's ``unbox``, which under a mesh and its rules constrains what it takes out, be it a shape and no array.
  """
  is_box = lambda x: isinstance(x, nn.Partitioned)
  return jax.tree.map(lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box)


def mesh_axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of an entry of a rule or a `PartitionSpec`."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def fitting(spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
  """The spec without what does not divide: an axis of the array whose mesh axes do not is whole on every device.

  Args:
    spec: how to split the array.
    shape: its shape.
    sizes: of the mesh axes.
  """
  ways = lambda entry: math.prod(sizes[name] for name in mesh_axes_of(entry))
  return PartitionSpec(*(entry if size % ways(entry) == 0 else None for entry, size in zip(spec, shape)))
